"""`svd`: the truncated singular value decomposition of the delta, by rank or by share of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Context, Encoded, LowRank, Term, rows_and_columns


@method
@dataclass(frozen=True)
class Svd:
    """Low rank.

    Attributes:
        rank: singular values kept, capped by the shape.
        bits: instead of a rank, the storage to aim at, in bits a weight; 0 means `rank` decides.
    """

    id: ClassVar[str] = "svd"
    summary: ClassVar[str] = "truncated SVD, the best low rank there is"
    paper: ClassVar[str] = "Eckart-Young 1936"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "low rank on the fly"
    on_device: ClassVar[bool] = True

    rank: int = 16
    bits: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.bits <= 16:
            raise DeltafoldError("bad-recipe", "svd: rank must be at least 1, bits 0 to 16")

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `lowrank` term."""
        return [self._term(tuple(delta.shape)).encode(delta, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `lowrank` term."""
        return [self._term(shape)]

    def _term(self, shape: tuple[int, ...]) -> LowRank:
        if not self.bits:
            return LowRank(rank=self.rank)
        rows, columns = rows_and_columns(shape)
        rank = int(self.bits * rows * columns / (16 * max(rows + columns, 1)))
        return LowRank(rank=max(rank, 1))
