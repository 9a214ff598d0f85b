"""`topk`: the largest entries of a tensor with their places, a plain magnitude cut.

The mask depends on the data, so it is stored: as run lengths, near its entropy, or as a bitmap.
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
