"""`quantize-and-drop`: codes first, then a random drop within each group of equal codes.

After UltraDelta (arXiv 2505.13563) and its released code for vision models: an even grid from the
least to the largest entry; of the entries of each level the same share dropped; the rest divided by
the share kept. Dropping within levels keeps each level's share, which a drop over the whole tensor
does only on average. Two of its steps are left out, hence the name: drop rates that differ between
layers by their deviation (they take a look at the whole model; give `--set` instead), and a factor
that its code derives from other tasks (`gamma` is that factor, to be chosen).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
        flat = delta.reshape(-1)
        table = even_table(flat, self.bits)
        codes = nearest(flat, table)
        gone = table[codes.to(torch.int64)] == 0
        # Zeros that are there already count towards the share that must be zero.
        present = int((~gone).sum())
        rate = max(1 - (1 - self.drop) * flat.numel() / max(present, 1), 0.0)
        words = words_of(flat.numel(), seed=self.seed, name=context.name)
        keep = torch.from_numpy(_kept_of_each(codes.numpy(), words, rate)) & ~gone
        term = self._term()
        parts = term.coded(codes[keep], table * (self.gamma / (1 - self.drop)))
        return [term.assemble(keep, parts)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `sparse-codes` term, its size as the drop rate promises."""
        return [self._term()]

    def _term(self) -> SparseCodes:
        return SparseCodes(mask="runs", bits=self.bits, drop=self.drop)


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
