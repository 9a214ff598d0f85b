"""`dare-ties`: DARE on each delta in place of the trim, then the election of TIES.

Source: Yu et al., "Language Models are Super Mario" (arXiv 2311.03099), section 3.3, with TIES-Merging
(arXiv 2306.01708); mergekit has it as `dare_ties`, and rescales otherwise than the paper. The paper
trims after the drop as well (`keep` of 0.5, 0.7 and 0.9 were searched); 1 leaves that out, as mergekit
does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.edits.dare import check_drop, dropped
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.merges.base import Merging, check_number, merge
from deltafold.compress.merges.election import hold_election
from deltafold.compress.terms import Context
from deltafold.compress.threshold import magnitude_thresholds


@merge
@dataclass(frozen=True)
class DareTies:
    """Random drop and rescale, trim, elect, disjoint mean.

    Attributes:
        drop: share of each delta's entries that is dropped at random.
        keep: share of each model's entries that the trim then keeps; dropped ones count.
        scale: factor of the result, lambda.
        seed: of the first delta's mask; each further one has the next number.
    """

    id: ClassVar[str] = "dare-ties"
    summary: ClassVar[str] = "dare on each delta, elect signs, average what agrees"
    paper: ClassVar[str] = "2311.03099"
    needs: ClassVar[tuple[Need, ...]] = ()

    drop: float = 0.5
    keep: float = 1.0
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_drop("dare-ties", self.drop, self.seed)
        if not 0 < self.keep <= 1:
            raise DeltafoldError(
                "bad-recipe", f"dare-ties: keep must be in (0, 1], not {self.keep}"
            )
        check_number("dare-ties", "scale", self.scale)

    def survey(
        self, deltas: Iterable[tuple[str, Sequence[torch.Tensor]]], weights: Sequence[float]
    ) -> Merging:
        """Find what the trim keeps, and the sign of most entries."""

        def drop(t: int, delta: torch.Tensor, context: Context) -> torch.Tensor:
            return dropped(delta, self.drop, self.seed + t, context.name) / (1 - self.drop)

        def read() -> Iterable[Sequence[torch.Tensor]]:
            for name, several in deltas:
                yield [drop(t, delta, Context(name)) for t, delta in enumerate(several)]

        least = [0.0] * len(weights)
        if self.keep < 1:
            least = magnitude_thresholds(read, len(weights), self.keep)

        def sparsify(t: int, delta: torch.Tensor, context: Context) -> torch.Tensor:
            kept = drop(t, delta, context)
            return torch.where(kept.abs() >= least[t], kept, 0.0)

        return hold_election(sparsify, deltas, weights, self.scale)
