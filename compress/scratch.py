"""Memory that is lent again and again: the system takes longer to give new memory than our loops to
fill it. Any thread may borrow; what comes back is kept for the next one until it is forgotten.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Self

import numpy as np
import torch
from numpy.typing import NDArray

_Bytes = NDArray[np.uint8]

#: What nobody borrows now, the latest to come back last.
_kept: list[_Bytes] = []
_lock = threading.Lock()
_PAGE: Final = 4096


@contextmanager
def borrowed(nbytes: int) -> Iterator[_Bytes]:
    """Bytes to work in, uint8 `[nbytes]`, with anything in them."""
    lent = _take(nbytes)
    try:
        yield lent[:nbytes]
    finally:
        _give_back([lent])


class Scratch:
    """What one piece of work borrows under names of its own; a context manager that gives it back.

    Not thread-safe: each worker has its own.
    """

    def __init__(self) -> None:
        self._lent: dict[str, _Bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _give_back(self._lent.values())
        self._lent = {}

    def lend(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """A tensor with anything in it.

        What it holds is lost when the same name is asked for again, or all is given back, so it must
        not be kept.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        if name not in self._lent or len(self._lent[name]) < nbytes:
            _give_back([self._lent.pop(name)] if name in self._lent else [])
            self._lent[name] = _take(nbytes)
        return torch.from_numpy(self._lent[name][:nbytes]).view(dtype).reshape(shape)


def forget(most: int = 0) -> None:
    """Give memory that nobody borrows back to the system, until `most` bytes of it are kept."""
    with _lock:
        while _kept and sum(map(len, _kept)) > most:
            del _kept[0]


def _take(nbytes: int) -> _Bytes:
    size = _rounded(nbytes)
    with _lock:
        for place in reversed(range(len(_kept))):
            # No larger one: whoever bounds memory counts what was asked for.
            if len(_kept[place]) == size:
                return _kept.pop(place)
    return np.empty(size, np.uint8)


def _give_back(memory: Iterable[_Bytes]) -> None:
    with _lock:
        _kept.extend(memory)
        # Some for each thread of a machine that is busy; the oldest are of sizes long past.
        del _kept[: -6 * (os.cpu_count() or 1)]


def _rounded(nbytes: int) -> int:
    """A size that many share: up to an eighth more than is asked for."""
    step = max(_PAGE, 1 << max(nbytes.bit_length() - 4, 0))
    return max(-(-nbytes // step), 1) * step
