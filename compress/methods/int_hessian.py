"""`int-hessian`: the codes of `int`, each rounding error mended by the columns behind it.

After GPTQ (Frantar et al., arXiv 2210.17323), applied to the delta instead of the weights. GPTQ goes on
with the compressed model's own inputs; here all layers see those of the fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress import bits as packing
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.methods.feedback import code_with_feedback
from deltafold.compress.methods.moments import weighted
from deltafold.compress.terms import Codes, Context, Encoded, Term
from deltafold.compress.terms.grids import Grid


@method
@dataclass(frozen=True)
class IntegerHessian:
    """Uniform codes with error feedback; plain `int` for tensors whose inputs were not seen.

    Layers that compute `x W` (Conv1D) get the plain form too: their scales run across the inputs.

    Attributes:
        bits: 2 to 8.
        group: columns that share a scale; 0 is the whole row.
        damp: share of the mean second moment that is added to each input's own.
    """

    id: ClassVar[str] = "int-hessian"
    summary: ClassVar[str] = "uniform codes, rounding errors mended by later columns"
    paper: ClassVar[str] = "after 2210.17323"
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    applied: ClassVar[str] = "codes on the fly"
    on_device: ClassVar[bool] = True

    bits: int = 4
    group: int = 0
    damp: float = 0.01

    def __post_init__(self) -> None:
        self._term()
        if not self.damp > 0:
            raise DeltafoldError("bad-recipe", "int-hessian: damp must be above 0")

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `codes` term."""
        known, term = weighted(delta, context), self._term()
        if known is None or known.turned:
            return [term.encode(delta, context)]
        grid = Grid(self.bits, self.group, symmetric=True, scale_format=term.scale_format)
        coded = code_with_feedback(known.matrix, known.moment, grid, damp=self.damp)
        parts = {"codes": packing.pack(coded.codes, self.bits)}
        return [Encoded(term, parts | grid.store_scales(coded.scales, ""))]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `codes` term."""
        return [self._term()]

    def _term(self) -> Codes:
        return Codes(bits=self.bits, group=self.group)
