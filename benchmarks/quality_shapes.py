"""Shapes that papers report, tried on the demo's fine-tunes, and told as they come out here."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quality_models import Bench, Measured, Task

from deltafold.compress import Budget, DeltafoldError, DeltaRepo, Recipe, parse_spec
from deltafold.compress.calibration import LogitFit, compress_and_fit, decoded_tensors
from deltafold.compress.edits import parse_edit
from deltafold.compress.methods import LosslessMethod


@dataclass(frozen=True)
class Shape:
    """A claim, and what became of it. `holds` is None where this version cannot try it."""

    name: str
    source: str
    expected: str
    found: str
    holds: bool | None


class Shapes:
    """The claims one by one; figures are means over the tasks."""

    def __init__(self, bench: Bench, *, quick: bool) -> None:
        self.bench, self.quick = bench, quick

    def run(self) -> list[Shape]:
        """All of them; what fails is told and does not end the run."""
        tried: list[Callable[[], Shape]] = [
            self.more_bits,
            self.dare_in_p,
            self.tables_left_out,
            self.norms_left_out,
        ]
        if not self.quick:
            tried += [
                self.one_is_the_identity,
                self.random_and_biased,
                self.interpolation,
                self.trim_and_drop,
                self.distilled_scales,
                self.budget,
            ]
        return [self._safely(one) for one in tried]

    def more_bits(self) -> Shape:
        """Every further bit takes KL away."""
        ladders = [["bitdelta:bits=1", "bitdelta:bits=2", "bitdelta:bits=4"]]
        if not self.quick:
            ladders.append(["int:bits=2", "int:bits=4", "int:bits=8"])
        for name in () if self.quick else ("codebook", "lloyd", "svd"):
            ladders.append([f"{name}:bits={bits}" for bits in (1, 2, 4)])
        found, holds = [], True
        for ladder in ladders:
            try:
                kl = [self._mean([self._codec(t, spec) for t in self._tasks]).kl for spec in ladder]
            except DeltafoldError as error:
                if error.code != "unknown-codec":
                    raise
                continue
            holds &= all(a > b for a, b in itertools.pairwise(kl))
            found.append(f"{ladder[0].partition(':')[0]} " + " > ".join(f"{v:.2g}" for v in kl))
        return Shape(
            "more bits", "2402.10193, section 3.3", "KL falls with bits", "; ".join(found), holds
        )

    def dare_in_p(self) -> Shape:
        """Dropping is free up to some rate, then ruins the model."""
        rates = (0.1, 0.9) if self.quick else (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
        right = [
            self._mean([self._codec(t, f"dare:drop={p}") for t in self._tasks]).accuracy
            for p in rates
        ]
        holds = right[0] > 0.95 and right[-1] < 0.5 * right[0]
        return Shape(
            "DARE in p",
            "2311.03099",
            "accuracy flat, then falling",
            ", ".join(f"p={p} {a:.0%}" for p, a in zip(rates, right, strict=True)),
            holds,
        )

    def one_is_the_identity(self) -> Shape:
        """k = 1 changes nothing."""
        found = self._mean([self._edit(t, "dare-k:k=1.0,p=0.5") for t in self._tasks])
        return Shape(
            "k = 1", "2410.13841, 3", "the fine-tune", f"KL {found.kl:.1e}", found.kl < 1e-9
        )

    def random_and_biased(self) -> Shape:
        """Table 1: random masks are harmless, a split by the gradient's sign ruins the model."""
        kinds = {
            "random": "dare-k:k={k},p=0.5",
            "by sign": "dare-k:k={k},mask=sign",
            "by gradient": "dare-k-gradient:k={k}",
        }
        loss: dict[str, float] = {}
        told = []
        for kind, spec in kinds.items():
            rows = []
            for k in (0.5, 0.9, 1.1, 1.5):
                at = self._mean([self._edit(t, spec.format(k=k)) for t in self._tasks])
                rows.append(at)
            loss[kind] = statistics.mean(r.loss for r in rows)
            told.append(f"{kind} " + "/".join(f"{r.accuracy:.0%}" for r in rows))
        holds = loss["random"] <= loss["by sign"] < loss["by gradient"]
        return Shape(
            "which entries",
            "2410.13841, table 1",
            "random flat, by sign a little lower, by gradient collapses (k = .5/.9/1.1/1.5)",
            "; ".join(told),
            holds,
        )

    def interpolation(self) -> Shape:
        """Which side of 1 is better is an empirical question; both are told."""
        found = {
            by: self._mean([self._edit(t, f"scale:by={by}") for t in self._tasks]).loss
            for by in (0.8, 0.9, 1.0, 1.1, 1.2)
        }
        return Shape(
            "interpolation and extrapolation",
            "2410.13841, figure 7",
            "interpolation better on most sets",
            ", ".join(f"{by:g}: loss {loss:.3g}" for by, loss in found.items()),
            min(found[0.8], found[0.9]) < min(found[1.1], found[1.2]),
        )

    def trim_and_drop(self) -> Shape:
        """Trimming without rescaling loses; a random drop of the same share, rescaled, does not."""
        trim = self._mean([self._edit(t, "trim:keep=0.5") for t in self._tasks])
        drop = self._mean([self._edit(t, "dare:drop=0.5") for t in self._tasks])
        return Shape(
            "trim against DARE, half of the entries",
            "2410.13841, section 4",
            "trim decreased, DARE competitive",
            f"KL of trim {trim.kl:.3g}, of DARE {drop.kl:.3g}",
            trim.kl > drop.kl,
        )

    def tables_left_out(self) -> Shape:
        """Without the delta of embedding and head."""
        found = self._left_out("embed", "lm_head")
        worst = min(found, key=lambda m: m.accuracy).accuracy
        return Shape(
            "tables left out",
            "release codes, which store them whole",
            "breaks",
            self._told(found),
            worst < 0.5,
        )

    def norms_left_out(self) -> Shape:
        """Without the delta of the norms."""
        found = self._left_out("norm")
        worst = min(found, key=lambda m: m.accuracy).accuracy
        return Shape(
            "norms left out",
            "DeltaZip's code, which takes the base's",
            "harmless",
            self._told(found),
            worst > 0.95,
        )

    def distilled_scales(self) -> Shape:
        """Training the scales on logits recovers some of what one bit loses."""
        before, after = [], []
        for task in self._tasks:
            recipe = Recipe(default=parse_spec("bitdelta:bits=1"))
            before.append(self._codec(task, "bitdelta:bits=1"))
            with tempfile.TemporaryDirectory() as folder:
                report = compress_and_fit(
                    self.bench.base.folder,
                    task.folder,
                    Path(folder) / "delta",
                    task.calibration,
                    fit=LogitFit(steps=100, lr=1e-4, batch=16),
                    recipe=recipe,
                )
                tensors = decoded_tensors(self.bench.base, DeltaRepo.open(report.out))
            after.append(self.bench.measure(task, tensors))
        first, second = self._mean(before), self._mean(after)
        return Shape(
            "distilled scales",
            "2402.10193, section 3.1",
            "recovers (1 bit, 100 steps)",
            f"KL {first.kl:.3g} to {second.kl:.3g}, accuracy {first.accuracy:.0%} to "
            f"{second.accuracy:.0%}",
            second.kl < first.kl,
        )

    def budget(self) -> Shape:
        """The planner against the same codec everywhere, at the same size."""
        told, holds = [], True
        for spec in ("bitdelta:bits=1,group=64", "bitdelta:bits=2,group=64"):
            alike, blind, seeing = [], [], []
            for task in self._tasks:
                found, repo = self.bench.pack(task, Recipe(default=parse_spec(spec)))
                size = str(repo.manifest.totals.delta_bytes)
                planned = Recipe(budget=Budget(size))
                alike.append(found)
                blind.append(self.bench.pack(task, planned)[0])
                seeing.append(self.bench.pack(task, planned, evidence=task.fisher())[0])
            kl = [self._mean(rows).kl for rows in (alike, blind, seeing)]
            holds &= kl[1] < kl[0] and kl[2] < kl[0]
            told.append(f"{spec}: KL {kl[0]:.3g}, planned {kl[1]:.3g}, with gradients {kl[2]:.3g}")
        return Shape("a budget", "-", "planned below alike", "; ".join(told), holds)

    @property
    def _tasks(self) -> list[Task]:
        return self.bench.tasks

    def _codec(self, task: Task, spec: str) -> Measured:
        return self.bench.pack(task, Recipe(default=parse_spec(spec)))[0]

    def _edit(self, task: Task, spec: str) -> Measured:
        return self.bench.pack(task, edited(spec))[0]

    def _left_out(self, *words: str) -> list[Measured]:
        found = []
        for task in self._tasks:
            tensors = self.bench.tensors_of(task.source)
            for name in tensors:
                if any(word in name for word in words):
                    tensors[name] = self.bench.base.tensor(name)
            found.append(self.bench.measure(task, tensors))
        return found

    def _told(self, found: Sequence[Measured]) -> str:
        pairs = zip(self._tasks, found, strict=True)
        return ", ".join(f"{task.name} {m.accuracy:.0%}" for task, m in pairs)

    def _safely(self, one: Callable[[], Shape]) -> Shape:
        try:
            return one()
        except DeltafoldError as error:
            return Shape(one.__name__.replace("_", " "), "-", "-", error.message, None)

    @staticmethod
    def _mean(rows: Sequence[Measured]) -> Measured:
        return mean(rows)


def edited(spec: str) -> Recipe:
    """An edit by itself: its result is kept in float32."""
    return Recipe(default=LosslessMethod(), edits=(("*", parse_edit(spec)),))


def mean(rows: Sequence[Measured]) -> Measured:
    """The mean over tasks."""
    fields = rows[0].__dataclass_fields__
    return Measured(**{f: statistics.mean(getattr(r, f) for r in rows) for f in fields})
