"""`task`: task arithmetic, the weighted sum of the deltas times one coefficient.

Source: Ilharco et al., "Editing models with task arithmetic" (arXiv 2212.04089), section 2; 0.4 is the
coefficient that its section 4 finds good without a search for each set of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.merges.base import check_number, merge, weighted_sum
from deltafold.compress.terms import Context


@merge
@dataclass(frozen=True)
class Task:
    """`scale * sum_t weight_t D_t`.

    Attributes:
        scale: the coefficient, lambda.
    """

    id: ClassVar[str] = "task"
    summary: ClassVar[str] = "task arithmetic: the weighted sum, times one coefficient"
    paper: ClassVar[str] = "2212.04089"
    needs: ClassVar[tuple[Need, ...]] = ()

    scale: float = 0.4

    def __post_init__(self) -> None:
        check_number("task", "scale", self.scale)

    def merge(
        self, deltas: Sequence[torch.Tensor], weights: Sequence[float], context: Context
    ) -> torch.Tensor:
        """The weighted sum, float32."""
        return weighted_sum(deltas, weights) * self.scale
