"""`sparse` and `topk`: what is not zero, or what is largest, with its places.

For deltas that an edit has thinned out (`trim:keep=0.2+sparse`), and for a plain magnitude cut. The
mask depends on the data, so it is stored: as run lengths, near its entropy, or as a bitmap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from deltafold.compress.errors import DeltafoldError
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


@method
@dataclass(frozen=True)
class TopK:
    """The largest entries of a tensor.

    Attributes:
        keep: share of the entries, in (0, 1].
        bits: of a value, 1 to 8, or 16 for float16 values.
        mask: how the places are stored.
    """

    id: ClassVar[str] = "topk"
    summary: ClassVar[str] = "the largest entries of each tensor, not rescaled"
    paper: ClassVar[str] = "-"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sparse on the fly"

    keep: float = 0.1
    bits: int = 16
    mask: Literal["runs", "bitmap"] = "runs"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise DeltafoldError("bad-recipe", f"topk: keep must be in (0, 1], not {self.keep}")
        self._term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `sparse-codes` term."""
        magnitudes = delta.abs().reshape(-1)
        count = min(round(self.keep * magnitudes.numel()), magnitudes.numel())
        cut = delta
        if 0 < count < magnitudes.numel():
            # Entries as large as the last one that fits are all kept: ties have no order.
            place = magnitudes.numel() - count
            least = np.partition(magnitudes.numpy(), place)[place]
            cut = torch.where(delta.abs() >= float(least), delta, 0.0)
        elif count == 0:
            cut = torch.zeros_like(delta)
        return [self._term().encode(cut, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `sparse-codes` term, its size as the share promises."""
        return [self._term()]

    def _term(self) -> SparseCodes:
        return SparseCodes(mask=self.mask, bits=self.bits, drop=1 - self.keep)
