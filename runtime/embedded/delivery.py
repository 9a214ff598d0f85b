"""How tokens reach those who asked for them, and the one place where a request ends."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.job import Job
from deltafold.runtime.embedded.sampler import Choice
from deltafold.runtime.engine import Chunk, FinishReason

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """Totals since the start; read by other threads, each field on its own."""

    steps: int = 0
    base_only_steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


class Delivery:
    """Hands out tokens and ends requests, for all models of an engine.

    Attributes:
        counters: totals over all of them.
    """

    def __init__(self, on_end: Callable[[Job], None]) -> None:
        """`on_end` is called once per request, before its last chunk goes out."""
        self.counters = Counters()
        self._on_end = on_end

    def deliver(self, job: Job, choice: Choice) -> bool:
        """Hand out a step's token; whether the request goes on."""
        if job.limit == 0:  # wanted the prompt's log-probabilities alone
            self.end(job, "length")
            return False
        if not choice.finite:
            self.end(job, "error", _not_finite(job))
            return False
        try:
            chunk = job.accept(choice)
        except Exception as error:
            self.fail([job], error)
            return False
        self.counters.generated_tokens += 1
        if chunk.finish_reason is not None:
            self._finish(job, chunk)
            return False
        return self._send(job, chunk)

    def end(self, job: Job, reason: FinishReason, error: Exception | None = None) -> None:
        """End a request without another token."""
        self._finish(job, Chunk("", finish_reason=reason, error=error))

    def fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """End requests with an error."""
        ids = ", ".join(s.ticket.id for s in jobs)
        _log.error("requests %s failed", ids, exc_info=error)
        # Receivers keep the error; it must not keep a whole pass's tensors alive with it.
        traceback.clear_frames(error.__traceback__)
        for job in jobs:
            self.end(job, "error", error)

    def _send(self, job: Job, chunk: Chunk) -> bool:
        try:
            job.on_chunk(chunk)
        except Exception:
            # The receiver is broken, not the request; nobody is left to tell.
            _log.exception("the receiver of request %s failed", job.ticket.id)
            if not job.ended:
                job.ended = True
                self._on_end(job)
            return False
        return True

    def _finish(self, job: Job, last: Chunk) -> None:
        assert not job.ended
        job.ended = True
        # First give back what the request held: who sees the last chunk may count on it.
        self._on_end(job)
        self._send(job, last)


def _not_finite(job: Job) -> DeltafoldError:
    return DeltafoldError(
        "not-finite",
        f"{job.ticket.variant} computed logits that are not numbers.",
        facts=[("scale", job.sampling.scale), ("tokens so far", len(job.tokens))],
        fix="try a smaller scale, or check the delta with `deltafold verify`",
    )
