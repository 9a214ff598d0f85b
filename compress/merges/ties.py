"""`ties`: trim each delta, elect a sign for each entry, average what agrees with it.

Source: Yadav et al., TIES-Merging (arXiv 2306.01708), section 4. The top 20 % are those of each whole
model, not of each tensor; lambda = 1 is what it takes without a validation set. Weights are one more
than in the paper: they count in the election and in the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.merges.base import Merging, check_number, merge
from deltafold.compress.merges.election import hold_election
from deltafold.compress.terms import Context
from deltafold.compress.threshold import magnitude_thresholds


@merge
@dataclass(frozen=True)
class Ties:
    """Trim, elect, disjoint mean.

    Attributes:
        keep: share of each model's entries that is kept.
        scale: factor of the result, lambda.
    """

    id: ClassVar[str] = "ties"
    summary: ClassVar[str] = "trim each delta, elect signs, average what agrees"
    paper: ClassVar[str] = "2306.01708"
    needs: ClassVar[tuple[Need, ...]] = ()

    keep: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise DeltafoldError("bad-recipe", f"ties: keep must be in (0, 1], not {self.keep}")
        check_number("ties", "scale", self.scale)

    def survey(
        self, deltas: Iterable[tuple[str, Sequence[torch.Tensor]]], weights: Sequence[float]
    ) -> Merging:
        """Find each model's threshold, and the sign of most entries; reads the models three times."""
        least = magnitude_thresholds(lambda: (d for _, d in deltas), len(weights), self.keep)

        def trimmed(t: int, delta: torch.Tensor, context: Context) -> torch.Tensor:
            return torch.where(delta.abs() >= least[t], delta, 0.0)

        return hold_election(trimmed, deltas, weights, self.scale)
