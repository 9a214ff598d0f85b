"""Work beside running streams: threads that step back for those that answer."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

#: Linux knows priorities by thread; 19 is the least.
_NICEST: Final = 19
#: Seconds after which a thread must let another one of its process run; Python's own is 5 ms, which a
#: step that calls a hundred operators would wait for again and again.
_TURN: Final = 2e-4


def reading_pool(name: str, threads: int = 1) -> ThreadPoolExecutor:
    """Threads that run where nothing else wants the processor, and so do those that they start."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_step_back)


def _step_back() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)


_lock = threading.Lock()
_readers = 0
_usual = sys.getswitchinterval()


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Within it, threads of this process take shorter turns at the interpreter."""
    global _readers, _usual
    with _lock:
        if not _readers:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual, _TURN))
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                sys.setswitchinterval(_usual)
