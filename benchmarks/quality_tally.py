"""Claims that are tried many times: over fine-tunes, rates and seeds, with means and spreads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quality_models import Bench, Measured, Task

from deltafold.compress import Recipe, parse_spec
from deltafold.compress.edits import parse_edit
from deltafold.compress.methods import LosslessMethod

#: Shares of single trials from which a claim counts as holding, mostly holding, and not holding.
_ALWAYS, _MOSTLY, _SELDOM = 0.95, 0.75, 0.25


@dataclass(frozen=True)
class Shape:
    """A claim, and what became of it.

    Attributes:
        name: in few words.
        source: who says so.
        expected: what they say.
        found: what was found here.
        held: single trials in which it held.
        tried: all trials; 0 where this version cannot try it.
    """

    name: str
    source: str
    expected: str
    found: str
    held: int = 0
    tried: int = 0

    @property
    def verdict(self) -> str:
        """In a word, and the trials behind it."""
        if not self.tried:
            return "not tried"
        share = self.held / self.tried
        if share >= _ALWAYS:
            word = "yes"
        elif share >= _MOSTLY:
            word = "mostly"
        else:
            word = "**no**" if share <= _SELDOM else "**mixed**"
        return f"{word} ({self.held} of {self.tried})"


@dataclass
class Tried:
    """Models made and measured for claims; what was measured once is kept.

    Attributes:
        bench: the demo's models.
        seeds: of random edits.
    """

    bench: Bench
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        self._known: dict[tuple[str, str, str], Measured] = {}

    @property
    def tasks(self) -> list[Task]:
        """The fine-tunes."""
        return self.bench.tasks

    def codec(self, task: Task, spec: str) -> Measured:
        """A fine-tune in a codec."""
        return self._once("codec", task, spec)

    def edit(self, task: Task, spec: str) -> Measured:
        """A fine-tune after an edit, its delta kept in float32."""
        return self._once("edit", task, spec)

    def codecs(self, spec: str) -> list[Measured]:
        """All fine-tunes in a codec."""
        return [self.codec(task, spec) for task in self.tasks]

    def edits(self, spec: str) -> list[Measured]:
        """All fine-tunes after an edit; once a seed where the spec has a place for one."""
        specs = [spec.format(seed=seed) for seed in self.seeds] if "{seed}" in spec else [spec]
        return [self.edit(task, one) for task in self.tasks for one in specs]

    def _once(self, kind: str, task: Task, spec: str) -> Measured:
        key = kind, task.name, spec
        if key not in self._known:
            recipe = Recipe(default=parse_spec(spec)) if kind == "codec" else edited(spec)
            self._known[key] = self.bench.pack(task, recipe)[0]
        return self._known[key]


def edited(spec: str) -> Recipe:
    """An edit by itself: its result is kept in float32."""
    return Recipe(default=LosslessMethod(), edits=(("*", parse_edit(spec)),))


def mean(rows: Sequence[Measured]) -> Measured:
    """The mean over fine-tunes."""
    fields = rows[0].__dataclass_fields__
    return Measured(**{f: statistics.mean(getattr(r, f) for r in rows) for f in fields})


def spread(values: Iterable[float], form: str = "{:.3g}") -> str:
    """A mean and the standard deviation beside it."""
    every = list(values)
    if len(every) < 2:
        return form.format(every[0])
    return f"{form.format(statistics.mean(every))} ± {form.format(statistics.stdev(every))}"


def geometric(values: Iterable[float]) -> str:
    """The geometric mean, and the factor of one standard deviation: for what spans decades."""
    logs = [math.log(max(value, 1e-12)) for value in values]
    middle = f"{math.exp(statistics.mean(logs)):.2g}"
    return middle if len(logs) < 2 else f"{middle} ×/ {math.exp(statistics.stdev(logs)):.1f}"


def share(values: Iterable[float]) -> str:
    """The same in per cent."""
    every = list(values)
    if len(every) < 2:
        return f"{every[0]:.0%}"
    return f"{statistics.mean(every):.0%} ± {100 * statistics.stdev(every):.0f}"
