"""Which option for which tensor, so that all together fit a size and lose least.

Every tensor has options, each with its bytes and its error; errors of tensors add up. The best choice
for a size is a multiple-choice knapsack. On the lower convex hull of each tensor's options the greedy
walk by slope (error saved a byte) is exact at every size that it stops at: it minimises
`error + lambda * bytes` for the slope `lambda` where it stands. What is left between two such sizes is
filled with the best upgrades that still fit, hull or not.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias


@dataclass(frozen=True, slots=True)
class Option:
    """One way of storing one tensor.

    Attributes:
        spec: the codec.
        cost: bytes in the delta, its lines in the payload's header included.
        error: what is lost, in the unit of the plan; adds up over tensors.
    """

    spec: str
    cost: int
    error: float


Options: TypeAlias = Mapping[str, Sequence[Option]]
Choice: TypeAlias = dict[str, Option]


class Step(NamedTuple):
    """One move along a tensor's hull: `saved` error for each of `to.cost - from.cost` bytes."""

    slope: float
    name: str
    to: Option


class Point(NamedTuple):
    """A place on the frontier: after `steps` moves the options cost `cost` and lose `error`."""

    steps: int
    cost: int
    error: float


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull: ascending cost, descending error, slopes that flatten.

    Of several options with the same cost and error the first stays.
    """
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.error)):
        if kept and option.error >= kept[-1].error:
            continue
        while len(kept) > 1 and _slope(kept[-1], option) >= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


class Frontier:
    """All the best choices, from the smallest size to the smallest error.

    Args:
        options: by tensor; at least one each.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        hulls = {name: hull(found) for name, found in options.items()}
        self.start: Choice = {name: points[0] for name, points in hulls.items()}
        steps = [
            Step(_slope(low, high), name, high)
            for name, points in hulls.items()
            for low, high in itertools.pairwise(points)
        ]
        # Of one tensor the slopes flatten, so its moves stay in order.
        self.steps: list[Step] = sorted(steps, key=lambda s: (-s.slope, s.name, s.to.cost))
        self.points = self._points()

    def _points(self) -> list[Point]:
        chosen = dict(self.start)
        points = [Point(0, _cost(chosen), _error(chosen))]
        for number, step in enumerate(self.steps, 1):
            old, last = chosen[step.name], points[-1]
            chosen[step.name] = step.to
            cost, error = (
                last.cost + step.to.cost - old.cost,
                last.error + step.to.error - old.error,
            )
            points.append(Point(number, cost, error))
        # Sums of differences drift; the end must not look better than nothing lost.
        return [p._replace(error=max(p.error, 0.0)) for p in points]

    def at(self, steps: int) -> Choice:
        """The choice after some moves."""
        chosen = dict(self.start)
        for step in self.steps[:steps]:
            chosen[step.name] = step.to
        return chosen

    def within(self, budget: int) -> Choice | None:
        """The choice that loses least of those found within `budget` bytes; None if none fits."""
        fitting = [p for p in self.points if p.cost <= budget]
        if not fitting:
            return None
        last = fitting[-1]
        return self._fill(self.at(last.steps), budget - last.cost)

    def _fill(self, chosen: Choice, room: int) -> Choice:
        """Spend what is left on the upgrades with the best slope that fit."""
        heap: list[tuple[float, str, int]] = []
        for name in chosen:
            self._push(heap, name, chosen[name], room)
        while heap:
            _, name, index = heapq.heappop(heap)
            better = self._options[name][index]
            extra = better.cost - chosen[name].cost
            if extra <= room:
                room -= extra
                chosen[name] = better
            # Room only shrinks: what does not fit now never will.
            self._push(heap, name, chosen[name], room)
        return chosen

    def _push(self, heap: list[tuple[float, str, int]], name: str, now: Option, room: int) -> None:
        upgrades = [
            (-_slope(now, option), name, index)
            for index, option in enumerate(self._options[name])
            if option.error < now.error and option.cost - now.cost <= room
        ]
        if upgrades:
            heapq.heappush(heap, min(upgrades))


def total(choice: Choice) -> Point:
    """Cost and error of a choice."""
    return Point(0, _cost(choice), _error(choice))


def _slope(low: Option, high: Option) -> float:
    """Error saved a byte; infinite where better costs nothing more."""
    saved, bytes_ = low.error - high.error, high.cost - low.cost
    return saved / bytes_ if bytes_ > 0 else float("inf")


def _cost(choice: Choice) -> int:
    return sum(option.cost for option in choice.values())


def _error(choice: Choice) -> float:
    return sum(option.error for option in choice.values())
