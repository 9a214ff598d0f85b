"""Memory that is lent again and again: the system takes longer to give new memory than our loops to
fill it. Any thread may borrow; what is given back is kept for the next one until it is forgotten.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

_free: list[NDArray[np.uint8]] = []
_lock = threading.Lock()


@contextmanager
def room(nbytes: int) -> Iterator[NDArray[np.uint8]]:
    """Bytes to work in, uint8 `[nbytes]`, with anything in them."""
    with _lock:
        fitting = [i for i, one in enumerate(_free) if len(one) >= nbytes]
        lent = _free.pop(min(fitting, key=lambda i: len(_free[i]))) if fitting else None
    if lent is None:
        lent = np.empty(nbytes, np.uint8)
    try:
        yield lent[:nbytes]
    finally:
        with _lock:
            _free.append(lent)
            _free.sort(key=len)
            # Three for each thread of a machine that is busy; the largest are worth most.
            del _free[: -3 * (os.cpu_count() or 1)]


def forget() -> None:
    """Give the memory back that nobody borrows now."""
    with _lock:
        _free.clear()
