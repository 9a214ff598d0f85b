"""`della-ties`: MagPrune on each delta in place of the trim, then the election of TIES.

Source: Deep et al., DELLA-Merging (arXiv 2406.11617): drop, elect, fuse. 1.1 is the coefficient of the
authors' example.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltafold.compress.edits.della import Della
from deltafold.compress.evidence import Need
from deltafold.compress.merges.base import Merging, check_number, merge
from deltafold.compress.merges.election import hold_election
from deltafold.compress.terms import Context


@merge
@dataclass(frozen=True)
class DellaTies:
    """Drop by magnitude at random, elect, disjoint mean.

    Attributes:
        drop: see the edit `della`, as for the others.
        window: see `della`.
        over: see `della`.
        scale: factor of the result, lambda.
        seed: of the first delta's choice; each further one has the next number.
    """

    id: ClassVar[str] = "della-ties"
    summary: ClassVar[str] = "della on each delta, elect signs, average what agrees"
    paper: ClassVar[str] = "2406.11617"
    needs: ClassVar[tuple[Need, ...]] = ()

    drop: float = 0.3
    window: float = 0.14
    over: Literal["row", "tensor"] = "row"
    scale: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        self._edit(0)
        check_number("della-ties", "scale", self.scale)

    def survey(
        self, deltas: Iterable[tuple[str, Sequence[torch.Tensor]]], weights: Sequence[float]
    ) -> Merging:
        """Find the sign of most entries; reads the models once."""

        def pruned(t: int, delta: torch.Tensor, context: Context) -> torch.Tensor:
            return self._edit(t).apply(delta, context)

        return hold_election(pruned, deltas, weights, self.scale)

    def _edit(self, t: int) -> Della:
        return Della(self.drop, self.window, over=self.over, seed=(self.seed + t) % 2**64)
