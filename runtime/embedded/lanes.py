"""One loop per model: the shared one, and each variant's own dense model while it has requests.

Rows of different models cannot share a forward pass, so each model has a batch of its own. They take
turns: a round is one step of every loop that has work, so that none waits for another to finish.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from deltafold.runtime.embedded.job import Job
from deltafold.runtime.embedded.loop import Counters, Loop
from deltafold.runtime.embedded.runner import Runner
from deltafold.runtime.embedded.scheduler import Limits
from deltafold.runtime.engine import FinishReason

#: The lane of the shared model.
_SHARED = ""


class Lanes:
    """All loops of an engine. Its thread steps them; others may read counters and properties.

    Attributes:
        counters: totals over all lanes.
    """

    def __init__(self, runner: Runner, limits: Limits, on_end: Callable[[Job], None]) -> None:
        """The shared model's `runner` and `limits`; the latter hold for each model by itself."""
        self._limits, self._on_end = limits, on_end
        shared = Loop(runner, limits, on_end)
        self.counters: Counters = shared.counters
        self._loops: dict[str, Loop] = {_SHARED: shared}

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return any(loop.busy for loop in self._loops.values())

    @property
    def reading(self) -> list[Job]:
        """Requests whose prompts are being read."""
        return [job for loop in list(self._loops.values()) for job in loop.reading]

    @property
    def shared(self) -> Loop:
        """The loop of the shared model."""
        return self._loops[_SHARED]

    @property
    def models(self) -> int:
        """Models with a batch at the moment, the shared one included."""
        return len(self._loops)

    def enter_thread(self) -> None:
        """Called first on the thread that will step."""
        self.shared.enter_thread()

    def add(self, job: Job) -> None:
        """Put a request in the line of its model."""
        self._lane(job).waiting.add(job)

    def step(self) -> None:
        """One step of every model that has work."""
        for key, loop in list(self._loops.items()):
            if loop.busy:
                loop.step()
            if key != _SHARED and not loop.busy:
                # The loop must not keep the model in memory: the host may want to drop it.
                del self._loops[key]

    def end_all(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End every request, whatever its state."""
        for loop in self._loops.values():
            loop.end_all(reason, error)

    def _lane(self, job: Job) -> Loop:
        if job.runner is None:
            return self.shared
        key = job.ticket.digest
        if key not in self._loops:
            limits = dataclasses.replace(self._limits, whole_prompts=job.runner.recurrent)
            self._loops[key] = Loop(job.runner, limits, self._on_end, self.counters)
        return self._loops[key]
