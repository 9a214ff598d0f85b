"""`stratified`: of every group of G entries keep one, chosen at random, times G.

A drop of share 1-1/G whose kept count is not left to chance: each row keeps one entry in every G
columns, so that errors of the rows' sums spread evenly and the place of a kept entry is log2 G bits.
The expected delta is the same as without it, as in DARE (arXiv 2311.03099); dropping within groups is
after DeltaDQ (arXiv 2410.08666), whose exact steps are not public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.edits.dare import check_seed
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.philox import words_of
from deltafold.compress.terms import Context, rows_and_columns


@edit
@dataclass(frozen=True)
class Stratified:
    """One entry a group.

    Attributes:
        group: G, neighbouring columns that share one kept entry; the last group of a row may be
            smaller, and its entry is multiplied by its own size.
        seed: of the choice.
    """

    id: ClassVar[str] = "stratified"
    summary: ClassVar[str] = "keep one entry of every group at random, times the group's size"
    paper: ClassVar[str] = "after 2410.08666"
    needs: ClassVar[tuple[Need, ...]] = ()

    group: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group < 1:
            raise DeltafoldError(
                "bad-recipe", f"stratified: group must be 1 or more, not {self.group}"
            )
        check_seed("stratified", self.seed)

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """Zero but for one entry a group."""
        rows, columns = rows_and_columns(tuple(delta.shape))
        groups = -(-columns // self.group)
        starts = np.arange(groups, dtype=np.uint64) * np.uint64(self.group)
        sizes = np.minimum(np.uint64(self.group), np.uint64(columns) - starts)
        drawn = words_of(rows * groups, seed=self.seed, name=context.name).reshape(rows, groups)
        # A word below 2^32 times the size, divided by 2^32: evenly spread, and no division.
        place = starts + ((drawn.astype(np.uint64) * sizes) >> np.uint64(32))
        index = torch.from_numpy(place.astype(np.int64))
        matrix = delta.reshape(rows, columns)
        kept = matrix.gather(1, index) * torch.from_numpy(sizes.astype(np.float32))
        return torch.zeros_like(matrix).scatter_(1, index, kept).reshape(delta.shape)
