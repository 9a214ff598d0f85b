"""`darex-q`: DARE with a divisor of its own for each tensor, chosen by what its layer's inputs say.

Source: Deng et al., DAREx (arXiv 2410.09344), the per-layer analytic choice of q, and the authors'
released code. For every output i of a layer, with `c_ij` the delta times the mean of input j,

    |eta (1 - (1-p)/q) sum_j c_ij + eta^2 phi(p) sum_j c_ij^2 / (4 q^2) + ln(2 / (1-gamma))|

is followed as q grows from 1-p in steps of 0.001, and the q of its least value is kept. It ends where
80 % of the outputs have passed their least value; the mean over outputs is the tensor's divisor. As in
the code, values are compared in float16, where a tie counts as passed, and those above 10,000 are not
followed: deltas of usual size are so small that the value hardly moves with q, and this is what then
leaves the divisor next to 1-p, DARE's own. Left out: a bias counts as one more input there.

For decoders the authors recommend one q for all tensors, found by trying several on the model (by the
least change of its outputs, or by labels). That search is not here: `dare:divisor=` takes its result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.edits.dare import check_drop, dropped
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.terms import Context, rows_and_columns

_STEP: Final = 0.001
#: Share of the outputs that must have passed their least value.
_PASSED: Final = 0.8
_LIMIT: Final = 10_000


@edit
@dataclass(frozen=True)
class DarexQ:
    """Random drop, divided by the q that the layer's inputs ask for.

    Tensors of no linear layer (norms, biases, embeddings) are divided by 1-p, as in DARE.

    Attributes:
        drop: p, in (0, 1).
        seed: of the mask.
        eta: balance of the two terms; the authors' 0.45, to be tuned.
        gamma: confidence of the bound.
    """

    id: ClassVar[str] = "darex-q"
    summary: ClassVar[str] = "dare with a divisor for each tensor, by its layer's inputs"
    paper: ClassVar[str] = "after 2410.09344"
    needs: ClassVar[tuple[Need, ...]] = ("activations",)

    drop: float = 0.9
    seed: int = 0
    eta: float = 0.45
    gamma: float = 0.95

    def __post_init__(self) -> None:
        check_drop("darex-q", self.drop, self.seed)
        if not (self.drop > 0 and 0 < self.gamma < 1 and math.isfinite(self.eta)):
            raise DeltafoldError("bad-recipe", "darex-q: drop and gamma must be in (0, 1)")

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """`(1-m) D / q`."""
        kept = dropped(delta, self.drop, self.seed, context.name)
        inputs = None if context.evidence is None else context.evidence.inputs
        if inputs is None or delta.dim() < 2 or not delta.numel():
            return kept / (1 - self.drop)
        matrix = delta.reshape(rows_and_columns(tuple(delta.shape)))
        return kept / divisor(matrix, inputs, self.drop, self.eta, self.gamma)


def divisor(
    delta: torch.Tensor, inputs: torch.Tensor, drop: float, eta: float = 0.45, gamma: float = 0.95
) -> float:
    """The q of one tensor.

    Args:
        delta: float32 `[N, M]`.
        inputs: float32 `[n, M]`, inputs of its layer.
        drop: p.
        eta: see `DarexQ`.
        gamma: see `DarexQ`.
    """
    mean = inputs.to(torch.float64).mean(0)
    weights = delta.to(torch.float64)
    first, second = weights @ mean, weights.square() @ mean.square()
    best = torch.full_like(first, 1 - drop)
    least = torch.full_like(first, _LIMIT, dtype=torch.float16)
    passed = torch.zeros(len(first), dtype=torch.bool)
    for step in range(round((1 - drop) / _STEP), 999):
        q = max(step * _STEP, 1 - drop)
        bound = eta**2 * _phi(drop) * second / (4 * q * q) + math.log(2 / (1 - gamma))
        found = (eta * (1 - (1 - drop) / q) * first + bound).abs().to(torch.float16)
        passed |= found >= least
        better = found <= least
        best, least = torch.where(better, q, best), torch.where(better, found, least)
        if passed.to(torch.float64).mean() >= _PASSED:
            break
    return best.mean().item()


def _phi(x: float) -> float:
    """`(1-2x) / ln((1-x)/x)`, which is 1/2 at 1/2."""
    return 0.5 if abs(x - 0.5) < 1e-6 else (1 - 2 * x) / math.log((1 - x) / x)
