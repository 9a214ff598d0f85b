"""`axis-signs`: one sign plane with a scale a row or a column, whichever loses less of the outputs.

After "Per-Axis Weight Deltas" (arXiv 2512.19720): each matrix gets scales along the axis that fits
its layer better on calibration inputs. There the scales of both are trained on those inputs for a few
epochs; here they are the least-squares optimum, which second moments give in closed form. The paper
goes on by training on logits: `--fit-scales`.

With signs S and second moments H, a layer loses `tr(E H E^T)`. With `E = D - diag(r) S` each row is a
problem of its own: `r_n = s_n H d_n / s_n H s_n`. With `E = D - S diag(c)`, entry by entry in the first
product: `(H * S^T S) c = diag(S^T D H)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress import bits as packing
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.methods.moments import weighted
from deltafold.compress.obs import damped
from deltafold.compress.terms import ColumnPlanes, Context, Encoded, Planes, Term, scales


@method
@dataclass(frozen=True)
class AxisSigns:
    """Signs with scales along the better axis; mean magnitudes of rows where no inputs were seen.

    Attributes:
        damp: share of the mean second moment that is added to each input's own.
    """

    id: ClassVar[str] = "axis-signs"
    summary: ClassVar[str] = "signs, scales a row or a column by the layer's outputs"
    paper: ClassVar[str] = "after 2512.19720"
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    applied: ClassVar[str] = "sign planes on the fly"

    damp: float = 0.01

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise DeltafoldError("bad-recipe", "axis-signs: damp must be above 0")

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `planes` term with a scale a row, or one `column-planes` term."""
        known = weighted(delta, context)
        if known is None or not delta.numel():
            return [Planes().encode(delta, context)]
        matrix, hessian = known.matrix.double(), damped(known.moment, self.damp)
        signs = torch.where(matrix >= 0, 1.0, -1.0).double()
        outputs, inputs = (
            scale_outputs(matrix, signs, hessian),
            scale_inputs(matrix, signs, hessian),
        )
        by_output = _lost(matrix - outputs.unsqueeze(1) * signs, hessian)
        by_input = _lost(matrix - inputs * signs, hessian)
        rowwise = (by_output <= by_input) != known.turned
        term: Term = Planes() if rowwise else ColumnPlanes()
        values = outputs if by_output <= by_input else inputs
        plus = signs.T > 0 if known.turned else signs > 0
        stored = scales.store(values.float().unsqueeze(0), "float16", "scales")
        packed = packing.pack(plus.to(torch.uint8).contiguous(), 1)
        return [Encoded(term, {"signs": packed.unsqueeze(0), **stored})]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """A `planes` term; which axis it will be shows when the inputs are known."""
        return [Planes()]


def scale_outputs(matrix: torch.Tensor, signs: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The best scale of each row: `[N]` of matrices `[N, M]` and second moments `[M, M]`, float64."""
    seen = signs @ hessian
    return (seen * matrix).sum(dim=1) / (seen * signs).sum(dim=1)


def scale_inputs(matrix: torch.Tensor, signs: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The best scale of each column: `[M]`, as above."""
    # A product entry by entry of two positive matrices is positive again (Schur).
    normal = hessian * (signs.T @ signs)
    wanted = (signs * (matrix @ hessian)).sum(dim=0)
    best: torch.Tensor = torch.linalg.solve(normal, wanted)
    return best


def _lost(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((error @ hessian) * error).sum())
