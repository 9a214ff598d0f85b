"""`stratified`: one random entry of every group of G columns, times G.

Its expected delta is the delta and its variance that of dropping a share 1 - 1/G at random, but every
group has its one: no row is longer than another, and a place takes log2 G bits. It is DARE's drop
(arXiv 2311.03099) within groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.philox import words_of
from deltafold.compress.terms import NM, Context, Encoded, Term, rows_and_columns


@method
@dataclass(frozen=True)
class Stratified:
    """One random entry of each group.

    Attributes:
        of: G, columns of a group, 2 to 256.
        bits: of a value, 2 to 8, or 16 for float16 values.
        seed: of the choice.
    """

    id: ClassVar[str] = "stratified"
    summary: ClassVar[str] = "one random entry of every G columns, times G"
    paper: ClassVar[str] = "after 2311.03099"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sparse below 30 % kept, else rebuilt"

    of: int = 16
    bits: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise DeltafoldError("bad-recipe", "stratified: seed must fit 64 unsigned bits")
        self._term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `nm` term."""
        term = self._term()
        matrix = delta.reshape(rows_and_columns(tuple(delta.shape)))
        rows, columns = matrix.shape
        # The last group of a row may be narrower; its one entry then stands for fewer.
        widths = (columns - torch.arange(0, columns, self.of)).clamp_max(self.of)
        words = words_of(rows * len(widths), seed=self.seed, name=context.name)
        drawn = torch.from_numpy(words.astype("int64")).reshape(rows, len(widths))
        positions = (drawn * widths) >> 32
        values = term.pick(matrix, positions) * widths
        return [term.assemble(positions, term.code(values))]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `nm` term."""
        return [self._term()]

    def _term(self) -> NM:
        return NM(1, self.of, self.bits)
