"""`dare-task`: DARE on each delta, then the weighted sum.

Source: Yu et al., "Language Models are Super Mario" (arXiv 2311.03099), section 3.3, with task
arithmetic; mergekit calls it `dare_linear`, and rescales otherwise than the paper. Coefficients from
0.5 to 1 were searched there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.edits.dare import check_drop, dropped
from deltafold.compress.evidence import Need
from deltafold.compress.merges.base import check_number, merge, weighted_sum
from deltafold.compress.terms import Context


@merge
@dataclass(frozen=True)
class DareTask:
    """Random drop and rescale, then `scale * sum_t weight_t D_t`.

    Attributes:
        drop: share of each delta's entries that is dropped.
        scale: the coefficient, lambda.
        seed: of the first delta's mask; each further one has the next number.
    """

    id: ClassVar[str] = "dare-task"
    summary: ClassVar[str] = "dare on each delta, then task arithmetic"
    paper: ClassVar[str] = "2311.03099"
    needs: ClassVar[tuple[Need, ...]] = ()

    drop: float = 0.5
    scale: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_drop("dare-task", self.drop, self.seed)
        check_number("dare-task", "scale", self.scale)

    def merge(
        self, deltas: Sequence[torch.Tensor], weights: Sequence[float], context: Context
    ) -> torch.Tensor:
        """The weighted sum of what was kept, float32."""
        kept = [dropped(d, self.drop, self.seed + t, context.name) for t, d in enumerate(deltas)]
        return weighted_sum(kept, weights) * (self.scale / (1 - self.drop))
