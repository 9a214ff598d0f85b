"""`nm`: a fixed number of entries of every block of columns, the largest N of every M, nearest codes.

2:4 is the layout of DeltaZip (arXiv 2312.05215, section 4), whose quality comes from error feedback by
activations; without it two sign planes lose less at the size of 2 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import NM, Context, Encoded, Term


@method
@dataclass(frozen=True)
class NMMethod:
    """The largest entries of each block.

    Attributes:
        keep: N, entries kept of a block.
        of: M, columns of a block, 2 to 256.
        bits: 2 to 8, or 16 for float16 values.
        group: kept entries that share a scale; 0 is the whole row.
    """

    id: ClassVar[str] = "nm"
    summary: ClassVar[str] = "the largest N of every M columns (2:4), nearest codes"
    paper: ClassVar[str] = "after 2312.05215"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sparse below 30 % kept, else rebuilt"

    keep: int = 2
    of: int = 4
    bits: int = 4
    group: int = 0

    def __post_init__(self) -> None:
        self._term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `nm` term."""
        return [self._term().encode(delta, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `nm` term."""
        return [self._term()]

    def _term(self) -> NM:
        return NM(self.keep, self.of, self.bits, self.group)
