"""How much memory a tensor's packing takes, and keeping the sum of it below a bound."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from deltafold.compress.errors import DeltafoldError

_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """`4GiB`, `500 MB`, `1.5G` or a number of bytes; KB and KiB both mean 1024.

    Raises:
        DeltafoldError: `bad-argument`.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if found is None:
        raise DeltafoldError("bad-argument", f"{text!r} is not a size.", fix="write e.g. 4GiB")
    return int(float(found[1]) * _UNITS[found[2]])


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
    def hold(self, nbytes: int) -> Iterator[None]:
        """Wait until `nbytes` more fit, and hold them; what is larger than the bound runs alone."""
        with self._free:
            while self._held and self._limit is not None and self._held + nbytes > self._limit:
                self._free.wait()
            self._held += nbytes
        try:
            yield
        finally:
            with self._free:
                self._held -= nbytes
                self._free.notify_all()
