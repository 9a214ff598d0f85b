"""`sparse`: what is not zero, with its places, for deltas that an edit has thinned out.

`trim:keep=0.2+sparse`, say. The mask depends on the data, so it is stored: as run lengths, near its
entropy (Golomb 1966), or as a bitmap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Context, Encoded, SparseCodes, Term


@method
@dataclass(frozen=True)
class SparseMethod:
    """Entries that are not zero.

    Attributes:
        bits: of a value, 1 to 8, or 16 for float16 values.
        mask: how the places are stored.
    """

    id: ClassVar[str] = "sparse"
    summary: ClassVar[str] = "what is not zero, for deltas that an edit has thinned out"
    paper: ClassVar[str] = "Golomb 1966"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sparse on the fly"
    #: Where nothing is zero there is a place of eight bytes for each entry, and its distance.
    entry_bytes: ClassVar[int] = 64

    bits: int = 16
    mask: Literal["runs", "bitmap"] = "runs"

    def __post_init__(self) -> None:
        self._term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `sparse-codes` term."""
        return [self._term().encode(delta, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `sparse-codes` term, as if nine entries of ten were zero."""
        return [self._term()]

    def _term(self) -> SparseCodes:
        return SparseCodes(mask=self.mask, bits=self.bits)
