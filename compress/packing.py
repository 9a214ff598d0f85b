"""Coding all tensors of a fine-tune: several at a time, within a bound of memory, one line a tensor
in the journal. What comes out does not depend on how many ran together, nor on how often the run was
cut short.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import torch

from deltafold.compress import dtypes, scratch
from deltafold.compress.coded import Coded, TensorStats
from deltafold.compress.evidence import RunningSource
from deltafold.compress.journal import Journal, Record
from deltafold.compress.limits import Limits, check_room, needs, working_bytes
from deltafold.compress.manifest import TensorEntry
from deltafold.compress.memory import MemoryBudget, trim
from deltafold.compress.payload import payload_digest
from deltafold.compress.progress import OnProgress, Progress
from deltafold.compress.several import finished
from deltafold.compress.streaming import Coder
from deltafold.compress.terms import config_of


def code_all(
    coder: Coder,
    names: list[str],
    journal: Journal,
    limits: Limits,
    progress: OnProgress,
    order: list[str] | None = None,
    check: Callable[[str], None] = lambda name: None,
) -> None:
    """Code every tensor that the journal does not have yet.

    Args:
        coder: codes one.
        names: all tensors.
        journal: what is done, and where it is noted.
        limits: how many at a time, and within which memory.
        progress: called after every tensor.
        order: the order in which tensors must be coded; None leaves it open.
        check: raises where a tensor's files were changed meanwhile.

    Raises:
        DeltafoldError: `not-enough-memory` before any work where the bound is too tight for a
            tensor; what coding raises, of the first tensor in the order of names that failed.
    """
    source = coder.evidence
    model = source.upcoming_bytes() if isinstance(source, RunningSource) else 0
    check_room(needs(coder, names), limits, model)
    left = [n for n in names if n not in journal.done]
    budget = MemoryBudget(limits.room(model))
    done = len(names) - len(left)
    threads = torch.get_num_threads()

    def one(name: str) -> None:
        with budget.hold(working_bytes(coder, name)) as unheld:
            if unheld is not None:
                # What others gave back counts as nobody's, so it must fit beside what is held.
                scratch.forget(unheld)
                trim()
            # Linear algebra rounds otherwise on more threads, and the bytes must not tell how many
            # tensors ran side by side. Runs with evidence code one at a time, and run a model.
            torch.set_num_threads(1 if coder.evidence is None else threads)
            record = _record(name, coder.code(name), coder, journal)
            # What was read twice must have been the same, or its digest is that of something else.
            check(name)
            journal.add(record)

    # The largest first, so that none is left to run alone at the end.
    by_size = sorted(left, key=lambda n: (-math.prod(coder.target.spec(n).shape), n))
    try:
        for name in finished(one, by_size if order is None else order, limits.jobs):
            done += 1
            spec = coder.target.spec(name)
            nbytes = math.prod(spec.shape) * dtypes.TORCH[spec.dtype].itemsize
            progress(Progress("pack", name, done, len(names), nbytes))
    finally:
        scratch.forget()
        torch.set_num_threads(threads)


def _record(name: str, coded: Coded, coder: Coder, journal: Journal) -> Record:
    """A finished tensor as the journal notes it."""
    if not coded.terms:
        return Record(name, coded.base, coded.variant)
    spec = coder.target.spec(name)
    shape = tuple(spec.shape)
    promised = sum(s.nbytes for term in coded.terms for s in term.parts(shape).values())
    written = sum(p.nbytes for places in coded.places for p in places.values())
    assert promised == written, f"{name}: {promised} bytes promised, {written} written"
    assert coded.stats is not None
    base = coder.source.spec(name).shape if name in coder.source else None
    entry = TensorEntry(
        shape=shape,
        dtype=spec.dtype,
        base_shape=base,
        sha256=coded.variant,
        terms=tuple(config_of(term) for term in coded.terms),
        payload_sha256=payload_digest([journal.reader(places) for places in coded.places]),
        bytes=written,
        rel_error=coded.stats.error,
    )
    return Record(
        name,
        coded.base,
        coded.variant,
        entry.model_dump(mode="json"),
        asdict(coded.stats),
        tuple(coded.places),
    )


def stats_of(record: Record) -> TensorStats:
    """The numbers of a finished tensor."""
    assert record.stats is not None
    return TensorStats(**dict(record.stats))
