"""From what was tried to a plan that meets its budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from deltafold.compress.budget.allocate import Choice
from deltafold.compress.budget.plan import FrontierPoint, Plan, Planner
from deltafold.compress.budget.probe import Probe
from deltafold.compress.budget.search import smallest_within
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.quality import figures
from deltafold.compress.recipe import Recipe
from deltafold.compress.repo import DeltaRepo

if TYPE_CHECKING:
    from deltafold.compress.pipeline import Job

#: Points of the frontier whose KL a sketch measures.
_SKETCHED: Final = 5
#: How often a choice is made anew where codecs go by what others were given.
_ROUNDS: Final = 6


def plan_of(job: Job, *, sketch: bool = False) -> Plan:
    """What packing would write: the codec of every tensor, and the delta's size to the byte.

    Codecs that follow the tensors before them, or look at all that have the same codec, are first
    tried as if the others were the fine-tune's own, then behind what was chosen, until the choice is
    its own best answer, or fits as it is. So what is promised is what packing does.

    Args:
        job: what is packed; its structure and needs were checked.
        sketch: measure some points of the frontier too, where there is a judge.

    Raises:
        DeltafoldError: `bad-argument` where nothing meets the budget, `needs-calibration` where one of
            KL has no judge; whatever codecs raise.
    """
    budget = job.recipe.budget
    if budget is not None and budget.max_kl and job.judge is None:
        raise DeltafoldError(
            "needs-calibration",
            "a budget of KL needs data to measure it on.",
            facts=[("max_kl", budget.max_kl)],
            fix="give a calibration set: --calibrate prompts.jsonl",
        )
    planner = _measure(job, job.recipe if budget is None else None)
    probe = _probe(job, planner)
    if budget is None or planner.by_itself:
        return planned(planner, probe, sketch=sketch)
    if budget.max_kl:
        found = choose(planner, probe, sketch=sketch)
        return _weighed(job, planner, found)
    planner, choice = _settled(job, planner, budget.target_bytes(planner.variant_bytes))
    return planned(planner, probe, sketch=sketch, choice=choice)


def _measure(job: Job, settled: Recipe | None) -> Planner:
    return Planner.measure(
        job.source,
        job.target,
        job.companions,
        job.recipe,
        job.recipe.budget,
        evidence=job.evidence,
        settled=settled,
        progress=job.progress,
    )


def _probe(job: Job, planner: Planner) -> Callable[[Choice], float] | None:
    if job.judge is None:
        return None
    return Probe(job.source, job.target, planner.recipe_of, job.judge, job.evidence).kl


def _settled(job: Job, planner: Planner, target: int) -> tuple[Planner, Choice]:
    """A choice within `target` bytes, and a planner that tried each tensor behind that choice."""
    room = target
    choice = planner.within(room)
    for number in range(_ROUNDS):
        before = planner.recipe_of(choice)
        planner = _measure(job, before)
        kept = planner.again(choice)
        over = 0 if kept is None else planner.nbytes(kept) - target
        if kept is not None and over <= 0 and number:
            return planner, kept
        room -= max(over, 0)
        choice = planner.within(room)
        if kept is not None and over <= 0 and planner.recipe_of(choice) == before:
            return planner, choice
    raise DeltafoldError(
        "bad-argument",
        f"no choice of these codecs was found that stays within {target:,} bytes.",
        facts=[("why", "how large they are depends on what the others are given")],
        fix="a larger --target-size, or fewer candidates that need `sequential`",
    )


def _weighed(job: Job, planner: Planner, found: Chosen) -> Plan:
    """The plan of a choice whose KL was measured, its size that of the codecs in their order."""
    plan = planner.plan(found.choice, kl=found.kl, probes=found.probes)
    behind = _measure(job, plan.recipe)
    kept = behind.again(found.choice)
    if kept is None:
        return plan
    nbytes = behind.nbytes(kept)
    others = [p for p in plan.frontier if p.nbytes != plan.nbytes]
    chosen = FrontierPoint(nbytes, plan.error, plan.kl)
    points = {p.nbytes: p for p in [*others, chosen]}
    frontier = tuple(points[size] for size in sorted(points))
    return replace(plan, nbytes=nbytes, frontier=frontier)


def judged(job: Job, repo: DeltaRepo) -> dict[str, Any]:
    """Figures of a packed delta, read back, for `record_quality`.

    Raises:
        DeltafoldError: `bad-argument` where it has more KL than its budget allows.
    """
    from deltafold.compress.calibration import decoded_tensors

    assert job.judge is not None
    found = job.judge.measure(decoded_tensors(job.source.checkpoint, repo))
    budget = job.recipe.budget
    if budget is not None and budget.max_kl and not found.kl <= budget.max_kl:
        raise too_much(found.kl, budget.max_kl)
    return figures(found, job.judge.record())


class Chosen(NamedTuple):
    """A choice, its KL where it was measured, and that of places of the frontier, by step."""

    choice: Choice
    kl: float | None
    probes: dict[int, float]


def planned(
    planner: Planner,
    kl_of: Callable[[Choice], float] | None,
    *,
    sketch: bool = False,
    choice: Choice | None = None,
) -> Plan:
    """The plan for the planner's budget, or for its recipe alone; arguments as `choose` has them."""
    found = choose(planner, kl_of, sketch=sketch, choice=choice)
    return planner.plan(found.choice, kl=found.kl, probes=found.probes)


def choose(
    planner: Planner,
    kl_of: Callable[[Choice], float] | None,
    *,
    sketch: bool = False,
    choice: Choice | None = None,
) -> Chosen:
    """A choice that meets the planner's budget.

    Args:
        planner: what was tried.
        kl_of: measures a choice; None without calibration data, which a budget of KL must have.
        sketch: measure some points of the frontier as well.
        choice: the choice of a size, if it was made.

    Raises:
        DeltafoldError: `bad-argument` where no choice meets the budget.
    """
    budget, frontier = planner.budget, planner.frontier
    probes: dict[int, float] = {}
    kl: float | None = None

    def kl_at(steps: int) -> float:
        assert kl_of is not None
        if steps not in probes:
            probes[steps] = kl_of(frontier.at(steps))
        return probes[steps]

    if budget is not None and budget.max_kl:
        assert kl_of is not None
        steps = smallest_within(frontier.points, budget.max_kl, kl_at).steps
        if steps is None:
            raise too_much(min(probes.values()), budget.max_kl)
        choice, kl = frontier.at(steps), probes[steps]
    elif choice is None and budget is not None:
        choice = planner.within(budget.target_bytes(planner.variant_bytes))
    choice = frontier.at(0) if choice is None else choice
    if kl_of is not None and sketch:
        kl = kl_of(choice) if kl is None else kl
        last = len(frontier.points) - 1
        for place in range(_SKETCHED):
            kl_at(round(place * last / (_SKETCHED - 1)))
    return Chosen(choice, kl, probes)


def too_much(found: float, most: float) -> DeltafoldError:
    """The error for a KL above the budget's."""
    return DeltafoldError(
        "bad-argument",
        f"no choice of codecs has a KL of {most:g} or less.",
        facts=[("least found", f"{found:.3g} nats a token")],
        fix="a larger --max-kl, or candidates that keep more: --candidates lossless",
    )
