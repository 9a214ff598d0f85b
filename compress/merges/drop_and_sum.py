"""`drop-and-sum`: drop so much of each delta that their supports hardly meet, then add them.

After SoTU (arXiv 2411.02813), which merges many fine-tunes of one vision model so: with T deltas each
keeps about 1/T of its entries. Whether what is kept is rescaled is not public, so both can be had. Its
classifier, which reads the merged model's features, is no part of this.
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
class DropAndSum:
    """Random drop, then `scale * sum_t weight_t D_t`.

    Attributes:
        drop: share of each delta's entries that is dropped; None takes `1 - 1/T` for T deltas.
        rescale: divide what is kept by `1 - drop`.
        scale: factor of the sum.
        seed: of the first delta's mask; each further one has the next number.
    """

    id: ClassVar[str] = "drop-and-sum"
    summary: ClassVar[str] = "keep a random 1/T of each of T deltas, add them"
    paper: ClassVar[str] = "after 2411.02813"
    needs: ClassVar[tuple[Need, ...]] = ()

    drop: float | None = None
    rescale: bool = False
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_drop("drop-and-sum", self.drop or 0.0, self.seed)
        check_number("drop-and-sum", "scale", self.scale)

    def merge(
        self, deltas: Sequence[torch.Tensor], weights: Sequence[float], context: Context
    ) -> torch.Tensor:
        """The weighted sum of what was kept, float32."""
        drop = 1 - 1 / len(deltas) if self.drop is None else self.drop
        kept = [dropped(d, drop, self.seed + t, context.name) for t, d in enumerate(deltas)]
        return weighted_sum(kept, weights) * (self.scale / (1 - drop if self.rescale else 1))
