"""How fast a long run goes, from its events."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltafold.compress.progress import Progress


class Meter:
    """Counts the steps of one phase after the other.

    Attributes:
        phase: what is going on.
        done: its steps so far.
    """

    def __init__(self) -> None:
        self.phase = ""
        self.done = self._bytes = 0
        # A phase is as long as it takes from the last step of the one before.
        self._began = self._last = time.monotonic()

    def count(self, event: Progress) -> bool:
        """Take up one step; whether a phase begins with it."""
        # The two models are hashed one after the other: the count starts again.
        new = event.phase != self.phase or event.done <= self.done
        if new:
            self.phase, self._bytes, self._began = event.phase, 0, self._last
        self.done = event.done
        self._bytes += event.nbytes
        self._last = time.monotonic()
        return new

    @property
    def bytes_per_second(self) -> float:
        """Since the phase began."""
        return self._bytes / max(time.monotonic() - self._began, 1e-6)

    def seconds_left(self, event: Progress) -> float:
        """As long as the rest will take if its steps take as long as those before."""
        return (time.monotonic() - self._began) / event.done * (event.total - event.done)
