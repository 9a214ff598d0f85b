"""`dare-k-gradient`: the split of `dare-k` by the sign of delta times gradient.

Source: arXiv 2410.13841, table 1, its third column: entries whose product of delta and gradient of the
loss is negative are multiplied by k, the others by `(1-kp)/(1-p)`. There it ruins the model at every k
but those next to 1, which is its point: what matters is not how much is changed but in which direction.
The p of the table is not stated; the share of negative products is measured unless p or both
multipliers are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.edits.dare_k import check_multipliers, split
from deltafold.compress.evidence import Need, known
from deltafold.compress.terms import Context


@edit
@dataclass(frozen=True)
class DareKGradient:
    """Two multipliers, by the sign of delta times gradient.

    Attributes:
        k: multiplier of entries whose product is negative.
        p: their share; None measures it in each tensor.
        other: multiplier of the other entries; None takes `(1-kp)/(1-p)`.
    """

    id: ClassVar[str] = "dare-k-gradient"
    summary: ClassVar[str] = "dare-k, split by the sign of delta times gradient"
    paper: ClassVar[str] = "2410.13841"
    needs: ClassVar[tuple[Need, ...]] = ("gradients",)

    k: float = 0.9
    p: float | None = None
    other: float | None = None

    def __post_init__(self) -> None:
        check_multipliers("dare-k-gradient", self.k, self.p, self.other)

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """`k D` where `D * gradient` is negative, `other D` elsewhere."""
        gradient = known(context.evidence, "gradient", self.id, context.name)
        return split(delta, delta * gradient < 0, self.k, self.p, self.other)
