"""`twin`: one delta that all tasks share, and for each task what is its own, at low rank.

Source: Lu et al., Twin-Merging (arXiv 2406.15479), and the authors' released code for the constants.
The shared expert is `W* = W0 + scale * sum_t D_t`; a task's own knowledge is taken against it, not
against the base: `v_t = SVD_r(W_t - W*)` with r a share of the smaller side, vectors whole. A request
runs `W* + sum_t w_t v_t`.

The weights come from a router that the paper trains on the shared expert's hidden states. The router is
not here: a request names the weights, `model = "shared+sql*0.7+law*0.3"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.merges.base import check_number, merge, weighted_sum
from deltafold.compress.terms import Context, LowRank, rows_and_columns


@merge
@dataclass(frozen=True)
class Twin:
    """A shared delta by task arithmetic, and low-rank deltas beside it.

    Attributes:
        scale: of the shared delta's sum.
        keep: share of a matrix's ranks that a task's own delta keeps.
    """

    id: ClassVar[str] = "twin"
    summary: ClassVar[str] = "one shared delta, and a low-rank one for each task beside it"
    paper: ClassVar[str] = "2406.15479"
    needs: ClassVar[tuple[Need, ...]] = ()

    scale: float = 0.3
    keep: float = 0.1

    def __post_init__(self) -> None:
        check_number("twin", "scale", self.scale)
        if not 0 < self.keep <= 1:
            raise DeltafoldError("bad-recipe", f"twin: keep must be in (0, 1], not {self.keep}")

    def merge(
        self, deltas: Sequence[torch.Tensor], weights: Sequence[float], context: Context
    ) -> torch.Tensor:
        """The shared delta, float32."""
        return weighted_sum(deltas, weights) * self.scale

    def exclusive(self, shape: tuple[int, ...]) -> LowRank:
        """The term of a task's own delta of one matrix, stack or convolution."""
        return LowRank(rank=max(int(self.keep * min(rows_and_columns(shape))), 1))
