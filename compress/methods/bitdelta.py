"""`bitdelta`: signs and scales, one bit a weight; with `bits` > 1, residual planes.

Source: Liu et al. (arXiv 2402.10193), sections 3.1 and 3.3, with the scales that need no data (the
paper's "initial" scales). Distilling the scales needs logits and is not done here. Scales a row or a
column after arXiv 2512.19720; `factor` after arXiv 2410.13841, section 4.2 (`c * mean|D|`), where 1 is
found to be best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.fast import Pair
from deltafold.compress.methods.base import method
from deltafold.compress.terms import ColumnPlanes, Context, Encoded, Planes, Term, scaled


@method
@dataclass(frozen=True)
class BitDelta:
    """Sign planes.

    Attributes:
        bits: planes, 1 to 8.
        scale: what a scale covers; "tensor" is the paper's.
        group: columns of a group; giving it means scale=group.
        factor: of every scale; for study, since 1 has the least squared error.
    """

    id: ClassVar[str] = "bitdelta"
    summary: ClassVar[str] = "residual sign planes; bits=1,scale=tensor is the paper's"
    paper: ClassVar[str] = "2402.10193"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sign planes on the fly"

    bits: int = 1
    scale: Literal["tensor", "row", "group", "column"] = "row"
    group: int = 0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise DeltafoldError(
                "bad-recipe", f"bitdelta: factor must be above 0, not {self.factor}"
            )
        self._term()

    @property
    def blockwise(self) -> bool:
        """Whether rows are coded without a look at others: a scale a row, or a group within one."""
        return bool(self.group) or self.scale in ("row", "group")

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One term of planes."""
        return [self._scaled(self._term().encode(delta, context))]

    def encode_pair(self, pair: Pair, context: Context) -> list[Encoded]:
        """The same for the difference of two matrices; not with a scale a column."""
        term = self._term()
        assert isinstance(term, Planes)
        return [self._scaled(term.encode_pair(pair))]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One term of planes."""
        return [self._term()]

    def _scaled(self, encoded: Encoded) -> Encoded:
        return encoded if self.factor == 1 else scaled(encoded, self.factor)

    def _term(self) -> Planes | ColumnPlanes:
        # A scale a tensor or row is too few bytes to save on; groups are where half pays.
        if self.group:
            return Planes(self.bits, "group", self.group, "float16")
        if self.scale == "column":
            return ColumnPlanes(self.bits, "float32")
        return Planes(self.bits, self.scale, 0, "float32")
