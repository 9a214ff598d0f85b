"""The smallest delta within a KL: a search along the frontier, each probe a real measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from deltafold.compress.budget.allocate import Point

#: A bracket this narrow, as a ratio of sizes, ends the search.
_CLOSE: Final = 1.01
_MOST_PROBES: Final = 16
_NOTHING: Final = 1e-12


class Found(NamedTuple):
    """Where the search ended.

    Attributes:
        steps: the place on the frontier; None where even its end has too much.
        kl: what was measured, by place.
    """

    steps: int | None
    kl: dict[int, float]


def smallest_within(points: Sequence[Point], most: float, kl_at: Callable[[int], float]) -> Found:
    """The first place of the frontier whose KL is at most `most`, as far as KL falls along it.

    The divergence rises about as a power of the plan's error, so the next probe is where the line
    through the bracket's ends, in logarithms, crosses `most`; every second probe halves the bracket.

    Args:
        points: the frontier, by step.
        most: the KL that is allowed.
        kl_at: measures the choice after some steps.
    """
    last = len(points) - 1
    kl = {last: kl_at(last)}
    if kl[last] > most:
        return Found(None, kl)
    if last:
        kl[0] = kl_at(0)
    low, high = 0, last
    if kl[0] <= most:
        return Found(0, kl)
    while high - low > 1 and points[high].cost > _CLOSE * points[low].cost:
        if len(kl) >= _MOST_PROBES:
            break
        probe = (low + high) // 2 if len(kl) % 2 else _crossing(points, low, high, kl, most)
        kl[probe] = kl_at(probe)
        if kl[probe] <= most:
            high = probe
        else:
            low = probe
    return Found(high, kl)


def _crossing(
    points: Sequence[Point], low: int, high: int, kl: dict[int, float], most: float
) -> int:
    """The step between `low` and `high` where a power law through both has `most`."""
    left, right = _log(kl[low]), _log(kl[high])
    share = (left - _log(most)) / max(left - right, _NOTHING)
    start, stop = _log(points[low].error), _log(points[high].error)
    wanted = start + share * (stop - start)
    inside = range(low + 1, high)
    return min(inside, key=lambda step: abs(_log(points[step].error) - wanted))


def _log(value: float) -> float:
    return math.log(max(value, _NOTHING))
