"""`svd-act`: the low rank that loses least of a layer's outputs, not of its weights.

With second moments `H = L L^T` of the inputs, the mean squared error of the outputs is
`|| (D - D^) L ||_F^2`. So the singular value decomposition of `D L` is cut off, and L is divided out
again: Eckart and Young in the layer's own metric. This is plain whitening, not a delta paper's method.
Less lost at every layer need not be less lost at the logits: at the lowest ranks plain `svd` can win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.methods.moments import weighted
from deltafold.compress.methods.svd import Svd
from deltafold.compress.obs import damped
from deltafold.compress.terms import Context, Encoded, LowRank, Term, scales
from deltafold.compress.terms.lowrank import truncated_svd


@method
@dataclass(frozen=True)
class SvdAct:
    """Low rank in the metric of the inputs; plain `svd` where none were seen.

    Attributes:
        rank: singular values kept, capped by the shape.
        bits: instead of a rank, the storage to aim at, in bits a weight; 0 means `rank` decides.
        damp: share of the mean second moment that is added to each input's own.
    """

    id: ClassVar[str] = "svd-act"
    summary: ClassVar[str] = "truncated SVD weighted by the layer's inputs"
    paper: ClassVar[str] = "Eckart-Young 1936, whitened"
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    applied: ClassVar[str] = "low rank on the fly"
    on_device: ClassVar[bool] = True

    rank: int = 16
    bits: float = 0.0
    damp: float = 0.01

    def __post_init__(self) -> None:
        self._plain()
        if not self.damp > 0:
            raise DeltafoldError("bad-recipe", "svd-act: damp must be above 0")

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `lowrank` term."""
        known = weighted(delta, context)
        if known is None:
            return self._plain().encode(delta, context)
        (term,) = self._plain().plan(tuple(delta.shape), "F32")
        assert isinstance(term, LowRank)
        rank = max(min(term.rank, *known.matrix.shape), 1)
        a, b = weighted_factors(known.matrix, known.moment, rank, self.damp)
        if known.turned:
            a, b = b.T.contiguous(), a.T.contiguous()
        parts = scales.store(a, term.factor_format, "a") | scales.store(b, term.factor_format, "b")
        return [Encoded(LowRank(rank, term.factor_format), parts)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `lowrank` term."""
        return self._plain().plan(shape, dtype)

    def _plain(self) -> Svd:
        return Svd(rank=self.rank, bits=self.bits)


def weighted_factors(
    matrix: torch.Tensor, moment: torch.Tensor, rank: int, damp: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 `a [rank, M]` and `b [N, rank]` with the least `tr(E H E^T)`, `E = D - b a`.

    Args:
        matrix: float32 `[N, M]`.
        moment: float32 `[M, M]`.
        rank: of the factors.
        damp: see `obs.damped`.
    """
    lower = torch.linalg.cholesky(damped(moment, damp))
    left, singular, right = truncated_svd((matrix.double() @ lower).float(), rank)
    root = singular.sqrt()
    # right L^-1, by solving X L = right.
    back = torch.linalg.solve_triangular(lower, right.double(), upper=False, left=False)
    return (root.unsqueeze(1) * back).float(), left * root
