"""Who is next: requests that wait, in order of arrival but fair between variants."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from deltafold.runtime.embedded.job import Job


class Waiting:
    """A queue per variant.

    Next is a request of the variant that has the fewest rows at the moment, and among those the
    one that came first. So one busy variant cannot keep the others out, and requests for a single
    variant are served in their order.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Job]] = {}

    def __len__(self) -> int:
        return sum(len(q) for q in self._queues.values())

    def __iter__(self) -> Iterator[Job]:
        for queue in self._queues.values():
            yield from queue

    def add(self, job: Job) -> None:
        """Queue a new request."""
        self._queues.setdefault(job.ticket.digest, deque()).append(job)

    def put_back(self, job: Job) -> None:
        """Queue a request that had a row and lost it: first in its variant's line again."""
        self._queues.setdefault(job.ticket.digest, deque()).appendleft(job)

    def peek(self, holding: Iterable[Job]) -> Job | None:
        """Who is next, given who holds rows; None if nobody waits."""
        rows = Counter(s.ticket.digest for s in holding)
        heads = [q[0] for q in self._queues.values()]
        return min(heads, key=lambda s: (rows[s.ticket.digest], s.order), default=None)

    def remove(self, job: Job) -> None:
        """Take a request out, wherever it stands in line."""
        queue = self._queues[job.ticket.digest]
        queue.remove(job)
        if not queue:
            del self._queues[job.ticket.digest]
