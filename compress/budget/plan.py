"""A plan: the codec of every tensor, the size of the delta to the byte, and the frontier around it."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deltafold.compress.budget.allocate import Choice, Frontier, total
from deltafold.compress.budget.goal import Budget
from deltafold.compress.budget.options import TensorTrial, Trial, Tried, is_free
from deltafold.compress.budget.size import companion_bytes, payload_bytes
from deltafold.compress.budget.survey import prepared, told_of_all, told_of_chosen
from deltafold.compress.checkpoint import Spec, TensorSource
from deltafold.compress.dtypes import TORCH
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import EvidenceSource
from deltafold.compress.methods import LosslessMethod, Method, parse_spec
from deltafold.compress.methods.chain import looks_around
from deltafold.compress.progress import OnProgress, ignore
from deltafold.compress.recipe import Recipe


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One best choice for its size.

    Attributes:
        nbytes: of the delta, as `Totals.delta_bytes` counts.
        error: in the unit of the plan.
        kl: nats a token, where it was measured.
    """

    nbytes: int
    error: float
    kl: float | None = None


@dataclass(frozen=True)
class Plan:
    """A chosen recipe and what is known of it before it is packed.

    Attributes:
        recipe: an ordinary recipe, without a budget.
        nbytes: the delta's size to the byte, as `Totals.delta_bytes` will count it.
        variant_bytes: the fine-tune's.
        error: of the choice, in `unit`.
        unit: what `error` is.
        codecs: tensors by spec.
        frontier: best choices by size, ascending, the chosen one among them.
        kl: of the choice on the calibration data, where it was measured.
    """

    recipe: Recipe
    nbytes: int
    variant_bytes: int
    error: float
    unit: str
    codecs: Mapping[str, int]
    frontier: tuple[FrontierPoint, ...] = ()
    kl: float | None = None

    @property
    def ratio(self) -> float:
        """Delta size over the fine-tune's."""
        return self.nbytes / max(self.variant_bytes, 1)

    def evidence(self) -> dict[str, Any]:
        """What a manifest keeps of it under `quality.plan`: what other sizes would have given."""
        return {"error": self.error, "error_unit": self.unit, "frontier": self._points()}

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "bytes": self.nbytes,
            "variant_bytes": self.variant_bytes,
            "ratio": self.ratio,
            "error": self.error,
            "error_unit": self.unit,
            "kl": self.kl,
            "codecs": dict(self.codecs),
            "frontier": self._points(),
            "recipe": self.recipe.to_json(),
        }

    def _points(self) -> list[dict[str, Any]]:
        return [
            {"bytes": p.nbytes, "error": p.error} | ({} if p.kl is None else {"kl": p.kl})
            for p in self.frontier
        ]


@dataclass(frozen=True)
class Planner:
    """Base, fine-tune and recipe with everything tried: answers what a size buys.

    Make one with `Planner.measure`.

    Attributes:
        recipe: the user's.
        trials: by tensor, those equal to the base's left out.
        fixed_bytes: of the delta's small files.
        variant_bytes: the fine-tune's.
        unit: of errors.
    """

    recipe: Recipe
    trials: Mapping[str, TensorTrial]
    fixed_bytes: int
    variant_bytes: int
    unit: str
    budget: Budget | None = field(default=None)

    @classmethod
    def measure(
        cls,
        source: TensorSource,
        target: TensorSource,
        companions: Mapping[str, Path],
        recipe: Recipe,
        budget: Budget | None,
        *,
        evidence: EvidenceSource | None = None,
        settled: Recipe | None = None,
        progress: OnProgress = ignore,
    ) -> Planner:
        """Try every candidate on every tensor, one tensor at a time.

        Args:
            source: the base.
            target: the fine-tune.
            companions: the small files of the delta.
            recipe: the user's.
            budget: None where the recipe says it all.
            evidence: of a calibration run.
            settled: what every tensor is taken to be coded with while another one is tried, for
                codecs that go by it. None is the fine-tune itself, and all tensors alike.
            progress: called after every tensor.

        Raises:
            DeltafoldError: `needs-calibration` for a candidate that needs what is not there, and
                whatever the codecs of tensors outside the budget raise.
        """
        ready = prepared(recipe, source, target, evidence)
        behind = None if settled is None else prepared(settled, source, target, evidence)
        told: dict[str, Method] = {}
        if budget is not None and any(map(looks_around, budget.candidates)):
            base = set(source.names())
            free = [n for n in target.names() if n in base and is_free(recipe, n, target.spec(n))]
            told = told_of_all(budget.candidates, ready, free, source, target, evidence)
            if settled is not None and behind is not None:
                told |= told_of_chosen(settled, behind)
        trial = Trial(source, target, ready, budget, evidence, progress, told, behind)
        weighted = evidence is not None and "gradients" in evidence.provides
        return cls(
            recipe,
            {found.name: found for found in trial.run()},
            companion_bytes(companions, source),
            sum(_nbytes(target.spec(name)) for name in target.names()),
            "geometric mean of relative and Fisher-weighted squared error"
            if weighted
            else "squared error over the tensor's squared norm",
            budget,
        )

    @cached_property
    def frontier(self) -> Frontier:
        """All best choices."""
        return Frontier(
            {name: [t.option for t in trial.tried] for name, trial in self.trials.items()}
        )

    def nbytes(self, choice: Choice) -> int:
        """Size of the delta with this choice, to the byte."""
        parts = [part for name in sorted(choice) for part in self._tried(name, choice).parts]
        return self.fixed_bytes + payload_bytes(parts)

    def within(self, target: int) -> Choice:
        """The choice that loses least within `target` bytes.

        Raises:
            DeltafoldError: `bad-argument` where nothing fits, with the least that is possible.
        """
        start = self.frontier.points[0]
        room = target - self.nbytes(self.frontier.start) + start.cost
        while True:
            choice = self.frontier.within(room)
            if choice is None:
                raise self._too_small(target)
            # Costs guess what the header adds, closely; the exact size decides.
            over = self.nbytes(choice) - target
            if over <= 0:
                return choice
            room -= over

    @property
    def by_itself(self) -> bool:
        """Whether what a codec makes of a tensor does not depend on the codecs of others."""
        candidates = self.budget.candidates if self.budget else ()
        return "sequential" not in self.recipe.needs() and not any(map(looks_around, candidates))

    def again(self, choice: Choice) -> Choice | None:
        """The same codecs with what they take and lose here; None where one cannot be had."""
        found = {
            name: next((t.option for t in trial.tried if t.option.spec == choice[name].spec), None)
            for name, trial in self.trials.items()
        }
        kept = {name: option for name, option in found.items() if option is not None}
        return kept if len(kept) == len(found) else None

    def plan(
        self,
        choice: Choice,
        *,
        kl: float | None = None,
        probes: Mapping[int, float] | None = None,
    ) -> Plan:
        """The plan of a choice.

        Args:
            choice: an option for every tensor.
            kl: of the choice, where it was measured.
            probes: KL of places of the frontier, by step.
        """
        nbytes = self.nbytes(choice)
        chosen = FrontierPoint(nbytes, total(choice).error, kl)
        return Plan(
            recipe=self.recipe_of(choice),
            nbytes=nbytes,
            variant_bytes=self.variant_bytes,
            error=chosen.error,
            unit=self.unit,
            codecs=dict(Counter(o.spec for o in choice.values()).most_common()),
            frontier=self._around(chosen, probes or {}),
            kl=chosen.kl,
        )

    def recipe_of(self, choice: Choice) -> Recipe:
        """An ordinary recipe: the commonest codec as default, the others by tensor."""
        specs = {name: o.spec for name, o in choice.items() if self.trials[name].free}
        methods = {spec: parse_spec(spec) for spec in set(specs.values())}
        default = self._default(Counter(specs.values()), methods)
        overrides = [
            (glob.escape(name), methods[spec])
            for name, spec in sorted(specs.items())
            if methods[spec] != default
        ]
        # The user's own come last, as they win.
        return replace(
            self.recipe,
            default=default,
            overrides=(*overrides, *self.recipe.overrides),
            budget=None,
        )

    def _default(self, counted: Counter[str], methods: Mapping[str, Method]) -> Method:
        for spec, _ in counted.most_common():
            # A lossless default would be one for vectors too.
            if not isinstance(methods[spec], LosslessMethod):
                return methods[spec]
        return self.recipe.default

    def _tried(self, name: str, choice: Choice) -> Tried:
        option = choice[name]
        return next(t for t in self.trials[name].tried if t.option is option)

    def _around(
        self, chosen: FrontierPoint, kl: Mapping[int, float], most: int = 12
    ) -> tuple[FrontierPoint, ...]:
        """A dozen points of the frontier, evenly by step, those with a measured KL, and the choice."""
        points = self.frontier.points
        if len(points) == 1:
            return (chosen,)
        stride = max((len(points) - 1) / (most - 1), 1.0)
        steps = {min(round(i * stride), len(points) - 1) for i in range(most)} | set(kl)
        found = {}
        for step in sorted(steps):
            nbytes = self.nbytes(self.frontier.at(step))
            found[nbytes] = FrontierPoint(nbytes, points[step].error, kl.get(step))
        return tuple(sorted({**found, chosen.nbytes: chosen}.values(), key=lambda p: p.nbytes))

    def _too_small(self, target: int) -> DeltafoldError:
        least = self.nbytes(self.frontier.start)
        return DeltafoldError(
            "bad-argument",
            f"no choice of codecs makes a delta of {target:,} bytes.",
            facts=[
                ("smallest", f"{least:,} bytes, {least / max(self.variant_bytes, 1):.2%}"),
                ("of these, small files", f"{self.fixed_bytes:,} bytes (tokenizer, configuration)"),
            ],
            fix="a larger --target-size, or candidates that take fewer bits",
        )


def _nbytes(spec: Spec) -> int:
    count = TORCH[spec.dtype].itemsize
    for size in spec.shape:
        count *= size
    return count
