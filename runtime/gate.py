"""One rule for a process: while transformers loads a model, nobody computes.

Its loader changes what belongs to the whole process: torch's default dtype, and methods of its own
classes. Two loads at a time would leave these changed for good, and a tensor that another thread makes
meanwhile, without naming a dtype, would be rounded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final


class Gate:
    """Many compute at a time, or one loads.

    A load that waits goes before computing that has not begun. Either may be begun again by a thread
    that is within it; a load must not be begun within a computation.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._computing = self._waiting = 0
        self._loader: int | None = None
        self._mine = threading.local()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within it, no model is loaded by another thread."""
        if self._depth or self._loader == threading.get_ident():
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._loader is None and not self._waiting)
            self._computing += 1
        self._mine.depth = 1
        try:
            yield
        finally:
            self._mine.depth = 0
            with self._changed:
                self._computing -= 1
                self._changed.notify_all()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within it, this thread alone loads, and no other computes."""
        if self._loader == threading.get_ident():
            yield
            return
        assert not self._depth, "a load within a computation would wait for itself"
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._loader is None and not self._computing)
            self._waiting -= 1
            self._loader = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._loader = None
                self._changed.notify_all()

    @property
    def _depth(self) -> int:
        return int(getattr(self._mine, "depth", 0))


#: The process's own.
GATE: Final = Gate()
