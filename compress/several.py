"""Work on many names, several at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait


def finished(work: Callable[[str], None], names: list[str], jobs: int) -> Iterator[str]:
    """Names as their work is done.

    Args:
        work: done for each name; what waits for the disk or runs in C runs side by side.
        names: in the order in which they are begun.
        jobs: how many at a time; one runs on the caller's thread.

    Raises:
        BaseException: what `work` raised, of the first name in the order of names that failed. Nothing
            new is begun after a failure.
    """
    if jobs == 1:
        for name in names:
            work(name)
            yield name
        return
    waiting = iter(names)
    with ThreadPoolExecutor(jobs, "deltafold") as pool:
        running: dict[Future[None], str] = {}
        failed: dict[str, BaseException] = {}
        while True:
            while not failed and len(running) < jobs:
                upcoming = next(waiting, None)
                if upcoming is None:
                    break
                running[pool.submit(work, upcoming)] = upcoming
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed[name] = error
                else:
                    yield name
    if failed:
        raise failed[min(failed)]


def cores(most: int) -> int:
    """How many threads pay for work that hashes and reads: the machine's cores, up to a few."""
    return max(1, min(os.cpu_count() or 1, most))
