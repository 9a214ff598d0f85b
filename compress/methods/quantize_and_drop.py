"""`quantize-and-drop`: codes first, then a random drop within each group of equal codes.

The step within a tensor of UltraDelta (arXiv 2505.13563): an even grid from the least to the largest
entry; of the entries of each level the same share dropped; the rest divided by the share kept. Dropping
within levels keeps each level's share, which a drop over the whole tensor does only on average. The
steps that look at the whole model, and at other fine-tunes, are in the codec `ultradelta`; here every
tensor is by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.philox import words_of
from deltafold.compress.terms import Context, Encoded, SparseCodes, Term
from deltafold.compress.terms.sparse_codes import even_table, nearest


@method
@dataclass(frozen=True)
class QuantizeAndDrop:
    """Codes, then drop.

    Attributes:
        bits: of a code, 1 to 8.
        drop: share of zeros, in [0, 1).
        gamma: factor of all that is kept; the paper chooses 0.5 to 1.
        seed: of the drop.
    """

    id: ClassVar[str] = "quantize-and-drop"
    summary: ClassVar[str] = "codes, then a random drop within each level, mask as run lengths"
    paper: ClassVar[str] = "after 2505.13563"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sparse on the fly"

    bits: int = 4
    drop: float = 0.95
    gamma: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise DeltafoldError("bad-recipe", "quantize-and-drop: gamma must be above 0")
        if not 1 <= self.bits <= 8:
            raise DeltafoldError("bad-recipe", "quantize-and-drop: bits must be 1 to 8")
        self._term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `sparse-codes` term."""
        found = dropped_codes(delta, self.bits, self.drop, seed=self.seed, name=context.name)
        return [found.stored(self._term(), self.gamma / (1 - self.drop))]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `sparse-codes` term, its size as the drop rate promises."""
        return [self._term()]

    def _term(self) -> SparseCodes:
        return SparseCodes(mask="runs", bits=self.bits, drop=self.drop)


class Dropped(NamedTuple):
    """The codes of a tensor of which some are dropped.

    Attributes:
        codes: uint8 `[numel]`.
        table: float32 levels.
        keep: bool `[numel]`.
    """

    codes: torch.Tensor
    table: torch.Tensor
    keep: torch.Tensor

    def stored(self, term: SparseCodes, factor: float) -> Encoded:
        """What is kept, times a factor."""
        return term.assemble(self.keep, term.coded(self.codes[self.keep], self.table * factor))


def dropped_codes(delta: torch.Tensor, bits: int, drop: float, *, seed: int, name: str) -> Dropped:
    """Codes of a float32 delta on an even grid, the same share of each level dropped.

    Args:
        delta: of any shape.
        bits: of a code.
        drop: share of zeros in the end; levels that are zero count towards it.
        seed: of the drop.
        name: the tensor's, which the drop depends on too.
    """
    flat = delta.reshape(-1)
    table = even_table(flat, bits)
    codes = nearest(flat, table)
    gone = table[codes.to(torch.int64)] == 0
    present = int((~gone).sum())
    rate = max(1 - (1 - drop) * flat.numel() / max(present, 1), 0.0)
    words = words_of(flat.numel(), seed=seed, name=name)
    keep = torch.from_numpy(_kept_of_each(codes.numpy(), words, rate)) & ~gone
    return Dropped(codes, table, keep)


def _kept_of_each(
    codes: np.typing.NDArray[np.uint8], words: np.typing.NDArray[np.uint32], rate: float
) -> np.typing.NDArray[np.bool_]:
    """All but `round(count * rate)` of the entries of each code: those with the largest words."""
    keep = np.zeros(codes.shape, dtype=np.bool_)
    order = np.argsort(codes.astype(np.uint64) << np.uint64(32) | words, kind="stable")
    counts = np.bincount(codes, minlength=256)
    ends = np.cumsum(counts)
    for count, end in zip(counts.tolist(), ends.tolist(), strict=True):
        dropped = round(count * rate)
        keep[order[end - count + dropped : end]] = True
    return keep
