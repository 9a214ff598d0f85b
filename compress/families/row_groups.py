"""`row-groups`: each row of a matrix is shared by the deltas whose rows point the same way.

After Zhang et al., "Channel Merging" (arXiv 2412.15283), which clusters experts' output channels by
similarity and merges those of one group. Its similarity, clustering and merge are not published; here
rows are clustered by spherical k-means (the cosine), started with the row farthest from all chosen
ones, and a group's row is the plain mean. No chance is involved. A delta then takes, of each row's
groups, the one that comes closest to its own row. With as many groups as members nothing is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.families.base import family
from deltafold.compress.terms import Context, Encoded, Shared

_MOST_STEPS = 20


@family
@dataclass(frozen=True)
class RowGroups:
    """Shared rows, and an index for each member.

    Attributes:
        groups: rows to choose from for each row of a matrix; never more than there are members.
    """

    id: ClassVar[str] = "row-groups"
    summary: ClassVar[str] = "rows clustered by direction over the members, an index for each"
    paper: ClassVar[str] = "after 2412.15283"
    applied: ClassVar[str] = "rows of the shared delta on the fly"
    needs: ClassVar[tuple[Need, ...]] = ()

    groups: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.groups <= 256:
            raise DeltafoldError("bad-recipe", "row-groups: groups must be 1 to 256")

    def share(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        """Means of the groups' rows, float32 `[groups * N, M]`; zero where a group is empty."""
        groups = min(self.groups, len(deltas))
        chosen = clusters(deltas, groups)
        rows, columns = deltas[0].shape
        table = torch.zeros(groups, rows, columns)
        for group in range(groups):
            for delta, mine in zip(deltas, chosen == group, strict=True):
                table[group] += delta * mine.unsqueeze(1)
            table[group] /= (chosen == group).sum(0).clamp_min(1).unsqueeze(1)
        return table.reshape(groups * rows, columns)

    def term(self, members: int) -> Shared:
        """Whole rows, so many groups."""
        return Shared(groups=min(self.groups, members), masked=False)

    def weigh(self, delta: torch.Tensor, stored: torch.Tensor) -> tuple[float, float]:
        """Rows are taken as they are."""
        return 1.0, 1.0

    def remainder(self, left: torch.Tensor, context: Context) -> list[Encoded]:
        """None."""
        return []


def clusters(deltas: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """Spherical k-means of the members, row by row.

    Args:
        deltas: float32 `[N, M]`, one a member (T of them).
        groups: at most T.

    Returns:
        int64 `[T, N]`: the group of each member's row.
    """
    if groups == len(deltas):
        # Parallel rows of different lengths would fall into one group, and others stay empty.
        return torch.arange(groups).unsqueeze(1).expand(-1, len(deltas[0]))
    cosines = _cosines(deltas)
    chosen = _nearest(cosines, _farthest(cosines, groups))
    for _ in range(_MOST_STEPS):
        # A centre is the sum of its members' unit rows, so its cosines follow from theirs.
        member = torch.nn.functional.one_hot(chosen, groups).to(torch.float64)  # [N, T, K]
        towards = cosines @ member
        length = (member * towards).sum(1, keepdim=True).clamp_min(0).sqrt()
        score = torch.where(length > 1e-9, towards / length.clamp_min(1e-9), -torch.inf)
        moved = score.argmax(2)
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return chosen.T


def _cosines(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 `[N, T, T]`; a row of zeros is at right angles to all others, and like itself."""
    unit = []
    for delta in deltas:
        length = torch.linalg.vector_norm(delta, dim=1, keepdim=True, dtype=torch.float64)
        unit.append(delta.double() / length.clamp_min(1e-300))
    rows, members = deltas[0].shape[0], len(deltas)
    cosines = torch.eye(members, dtype=torch.float64).expand(rows, members, members).clone()
    for i, one in enumerate(unit):
        for j in range(i):
            cosines[:, i, j] = cosines[:, j, i] = (one * unit[j]).sum(1)
    return cosines


def _farthest(cosines: torch.Tensor, groups: int) -> torch.Tensor:
    """int64 `[N, K]`: members that start the groups, each the least like all before it."""
    starts = torch.zeros(len(cosines), 1, dtype=torch.int64)
    for _ in range(1, groups):
        like = cosines.gather(2, starts.unsqueeze(1).expand(-1, cosines.shape[1], -1)).amax(2)
        like.scatter_(1, starts, torch.inf)
        starts = torch.cat([starts, like.argmin(1, keepdim=True)], 1)
    return starts


def _nearest(cosines: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """int64 `[N, T]`: the starting member that each is most like; a starter is its own."""
    like = cosines.gather(2, starts.unsqueeze(1).expand(-1, cosines.shape[1], -1))
    chosen = like.argmax(2)
    groups = torch.arange(starts.shape[1]).expand(len(starts), -1)
    return chosen.scatter(1, starts, groups)
