"""The variants in memory: loaded on first use, kept while used, dropped least recently used first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from deltafold.runtime.loading import LoadedVariant, RebuiltVariant

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What takes a place in memory: a delta in its fastest form, or a dense model.
Resident: TypeAlias = LoadedVariant | RebuiltVariant


@dataclass
class _Seat:
    loaded: Resident
    users: int = 0


class Residency:
    """Loaded variants by digest. Thread-safe; two requests for one variant load it once.

    Args:
        load: reads a variant; called without the lock, so other variants can be used meanwhile.
        limit: most variants to keep; those in use are never dropped, so it can be exceeded while
            more than `limit` variants have running requests. None keeps all.
        on_drop: called with each variant that was dropped.
    """

    def __init__(
        self,
        limit: int | None,
        on_drop: Callable[[Resident], None] = lambda loaded: None,
    ) -> None:
        self._limit, self._on_drop = limit, on_drop
        self._seats: OrderedDict[str, _Seat] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}

    def acquire(self, digest: str, load: Callable[[], Resident]) -> Resident:
        """The variant behind a digest, loaded if need be; it stays until `release`."""
        with self._single_flight(digest):
            seat = self._take(digest)
            if seat is None:
                loaded = load()
                with self._lock:
                    seat = self._seats[digest] = _Seat(loaded)
                    seat.users = 1
                self._shrink()
            return seat.loaded

    def release(self, digest: str) -> None:
        """Undo one `acquire`."""
        with self._lock:
            seat = self._seats[digest]
            assert seat.users > 0, digest
            seat.users -= 1
        self._shrink()

    def drop_idle(self) -> bool:
        """Drop every variant that nobody uses; whether there was one."""
        with self._lock:
            idle = [digest for digest, seat in self._seats.items() if seat.users == 0]
            dropped = [self._seats.pop(digest).loaded for digest in idle]
        for loaded in dropped:
            self._on_drop(loaded)
        return bool(dropped)

    def resident(self) -> dict[str, Resident]:
        """What is in memory, least recently used first."""
        with self._lock:
            return {digest: seat.loaded for digest, seat in self._seats.items()}

    def _take(self, digest: str) -> _Seat | None:
        with self._lock:
            seat = self._seats.get(digest)
            if seat is not None:
                seat.users += 1
                self._seats.move_to_end(digest)
            return seat

    @contextmanager
    def _single_flight(self, digest: str) -> Iterator[None]:
        with self._lock:
            lock = self._loading.setdefault(digest, threading.Lock())
        with lock:
            yield

    def _shrink(self) -> None:
        dropped = []
        with self._lock:
            if self._limit is None:
                return
            for digest in list(self._seats):
                if len(self._seats) <= self._limit:
                    break
                if self._seats[digest].users == 0:
                    dropped.append(self._seats.pop(digest).loaded)
        for loaded in dropped:
            self._on_drop(loaded)
