"""From what was tried to a plan that meets its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from deltafold.compress.budget.allocate import Choice
from deltafold.compress.budget.plan import Plan, Planner
from deltafold.compress.budget.probe import Probe
from deltafold.compress.budget.search import smallest_within
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.quality import figures
from deltafold.compress.repo import DeltaRepo

if TYPE_CHECKING:
    from deltafold.compress.pipeline import Job

#: Points of the frontier whose KL a sketch measures.
_SKETCHED: Final = 5


def plan_of(job: Job, *, sketch: bool = False) -> Plan:
    """What packing would write: the codec of every tensor, and the delta's size to the byte.

    Args:
        job: what is packed; its structure and needs were checked.
        sketch: measure some points of the frontier too, where there is a judge.

    Raises:
        DeltafoldError: `bad-argument` where nothing meets the budget, `needs-calibration` where one of
            KL has no judge; whatever codecs raise.
    """
    planner = Planner.measure(
        job.source,
        job.target,
        job.companions,
        job.recipe,
        job.recipe.budget,
        evidence=job.evidence,
        progress=job.progress,
    )
    probe = None
    if job.judge is not None:
        probe = Probe(job.source, job.target, planner.recipe_of, job.judge, job.evidence).kl
    return planned(planner, probe, sketch=sketch)


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


def planned(
    planner: Planner, kl_of: Callable[[Choice], float] | None, *, sketch: bool = False
) -> Plan:
    """The plan for the planner's budget, or for its recipe alone.

    Args:
        planner: what was tried.
        kl_of: measures a choice; None without calibration data.
        sketch: measure some points of the frontier as well.

    Raises:
        DeltafoldError: `needs-calibration` for a KL without `kl_of`; `bad-argument` where no choice
            meets the budget.
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
        if kl_of is None:
            raise DeltafoldError(
                "needs-calibration",
                "a budget of KL needs data to measure it on.",
                facts=[("max_kl", budget.max_kl)],
                fix="give a calibration set: --calibrate prompts.jsonl",
            )
        steps = smallest_within(frontier.points, budget.max_kl, kl_at).steps
        if steps is None:
            raise too_much(min(probes.values()), budget.max_kl)
        choice, kl = frontier.at(steps), probes[steps]
    elif budget is not None:
        choice = planner.within(budget.target_bytes(planner.variant_bytes))
    else:
        choice = frontier.at(0)
    if kl_of is not None and sketch:
        kl = kl_of(choice) if kl is None else kl
        last = len(frontier.points) - 1
        for place in range(_SKETCHED):
            kl_at(round(place * last / (_SKETCHED - 1)))
    return planner.plan(choice, kl=kl, probes=probes)


def too_much(found: float, most: float) -> DeltafoldError:
    """The error for a KL above the budget's."""
    return DeltafoldError(
        "bad-argument",
        f"no choice of codecs has a KL of {most:g} or less.",
        facts=[("least found", f"{found:.3g} nats a token")],
        fix="a larger --max-kl, or candidates that keep more: --candidates lossless",
    )
