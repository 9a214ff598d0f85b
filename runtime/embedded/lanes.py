"""One loop per model: the shared one, and each variant's own dense model while it has requests.

Rows of different models cannot share a forward pass, so each model has a batch of its own. They take
turns: a round is one step of every loop that has work, so that none waits for another to finish, and
one whole batch of those requests that are written so (see `batches`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from deltafold.runtime.embedded.batches import Batches
from deltafold.runtime.embedded.delivery import Counters, Delivery
from deltafold.runtime.embedded.job import Job
from deltafold.runtime.embedded.loop import Loop
from deltafold.runtime.embedded.runner import Runner
from deltafold.runtime.embedded.scheduler import Limits
from deltafold.runtime.engine import FinishReason

#: The lane of the shared model.
_SHARED = ""


class Lanes:
    """All loops of an engine. Its thread steps them; others may read counters and properties."""

    def __init__(
        self, runner: Runner | None, limits: Limits, delivery: Delivery, batches: Batches
    ) -> None:
        """No `runner` where the shared model writes in whole batches alone. `limits` hold for each
        model by itself.
        """
        self._limits, self._delivery, self._batches = limits, delivery, batches
        self._loops: dict[str, Loop] = {}
        if runner is not None:
            self._loops[_SHARED] = Loop(runner, limits, delivery)

    @property
    def counters(self) -> Counters:
        """Totals over all lanes."""
        return self._delivery.counters

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self._batches.busy or any(loop.busy for loop in self._loops.values())

    @property
    def reading(self) -> list[Job]:
        """Requests whose prompts are being read, or that are written in a whole batch."""
        read = [job for loop in list(self._loops.values()) for job in loop.reading]
        return read + self._batches.running

    @property
    def by_token(self) -> bool:
        """Whether the shared model can take requests into its running batch."""
        return _SHARED in self._loops

    @property
    def shared(self) -> Loop:
        """The loop of the shared model."""
        return self._loops[_SHARED]

    @property
    def models(self) -> int:
        """Models with a batch at the moment, the shared one included."""
        return max(1, len(self._loops))

    def add(self, job: Job) -> None:
        """Put a request in the line of its model."""
        if job.writing is not None:
            self._batches.waiting.append(job)
        else:
            self._lane(job).waiting.add(job)

    def step(self, closing: Callable[[], bool]) -> None:
        """One step of every model that has work; `closing` cuts a whole batch short."""
        for key, loop in list(self._loops.items()):
            if loop.busy:
                loop.step()
            if key != _SHARED and not loop.busy:
                # The loop must not keep the model in memory: the host may want to drop it.
                del self._loops[key]
        if self._batches.busy:
            self._batches.step(closing)

    def end_all(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End every request, whatever its state."""
        for loop in self._loops.values():
            loop.end_all(reason, error)
        self._batches.end_all(reason, error)

    def _lane(self, job: Job) -> Loop:
        if job.runner is None:
            return self.shared
        key = job.ticket.digest
        if key not in self._loops:
            limits = dataclasses.replace(self._limits, whole_prompts=job.runner.recurrent)
            self._loops[key] = Loop(job.runner, limits, self._delivery)
        return self._loops[key]
