"""Memory: what the process holds, and keeping a sum below a bound."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch


class MemoryBudget:
    """Bytes that run at the same time. Thread-safe.

    Args:
        limit: most bytes held together; None means no bound.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._held = 0
        self._free = threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[int | None]:
        """Wait until `nbytes` more fit, and hold them; what is larger than the bound runs alone.

        Yields:
            Bytes that nobody holds then; None without a bound.
        """
        with self._free:
            while self._held and self._limit is not None and self._held + nbytes > self._limit:
                self._free.wait()
            self._held += nbytes
            unheld = None if self._limit is None else max(self._limit - self._held, 0)
        try:
            yield unheld
        finally:
            with self._free:
                self._held -= nbytes
                self._free.notify_all()


def resident() -> int:
    """Bytes of memory that this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return peak_memory()
    return pages * resource.getpagesize()


def trim() -> None:
    """Give memory that the allocator keeps for later back to the system, where it can do that."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of this machine or of a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's allocator of main memory has no class of its own for it.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def peak_memory() -> int:
    """The most memory in bytes that this process has held so far."""
    # On Linux what `getrusage` tells counts the process that started this one, too.
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, ValueError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Timeline:
    """Memory while packing: a sample now and then, on a thread of its own.

    Attributes:
        samples: seconds since the start, and bytes held then.
    """

    def __init__(self, every: float = 0.25) -> None:
        self._every = every
        self._stop = threading.Event()
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="deltafold-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        began = time.monotonic()
        while True:
            self.samples.append((time.monotonic() - began, resident()))
            # Long runs are sampled more thinly: a few hundred points draw the same picture.
            if self._stop.wait(self._every * (1 + len(self.samples) // 200)):
                return
