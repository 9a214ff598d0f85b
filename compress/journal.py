"""What a packing run has finished, so that a run that was cut short goes on where it stopped.

Parts go to a spool file as they are made, and a line to the journal once they are there. A line holds
a checksum of itself, and the tensor's entry one of its parts: a line or a part that was torn by a kill,
a full disk or a power cut is found out and its tensor is coded again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import torch

from deltafold.compress import dtypes
from deltafold.compress.payload import payload_digest

_JOURNAL: Final = ".journal"
_SPOOL: Final = ".spool"


@dataclass(frozen=True)
class Place:
    """Where one part lies in the spool: safetensors dtype, shape, and the first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return dtypes.TORCH[self.dtype].itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Record:
    """One finished tensor.

    Attributes:
        name: the tensor.
        base: sha256 of the base's tensor, None where the base has none.
        variant: sha256 of the fine-tune's tensor, None where the fine-tune has none.
        entry: the manifest's entry as JSON; None where nothing is stored.
        stats: numbers for the table of tensors.
        parts: by term number, the places of its parts.
    """

    name: str
    base: str | None
    variant: str | None
    entry: Mapping[str, Any] | None = None
    stats: Mapping[str, float] | None = None
    parts: tuple[Mapping[str, Place], ...] = ()


class Journal:
    """The journal and the spool of one output folder. Thread-safe.

    Args:
        folder: the folder that is being made.
        identity: names inputs and settings; what another run left is dropped.
        stamps: of the inputs' files, anything that JSON keeps.

    Attributes:
        done: finished tensors by name.
        resumed: how many of them an earlier run finished.
        stamps: those that `done` belongs to.
    """

    def __init__(self, folder: Path, identity: str, stamps: Any = None) -> None:
        self._journal_path, self._spool_path = folder / _JOURNAL, folder / _SPOOL
        self._lock = threading.Lock()
        self.done: dict[str, Record] = {}
        self.stamps: Any = stamps
        kept, end = self._read(identity)
        self._spool = self._open(self._spool_path, end)
        self._journal = self._open(self._journal_path, kept)
        for name in [n for n, record in self.done.items() if not self._sound(record)]:
            del self.done[name]
        self.resumed = len(self.done)
        if not kept:
            self._line({"identity": identity, "stamps": stamps})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()
        self._journal.close()

    def put(self, tensor: torch.Tensor) -> Place:
        """Keep a part of a tensor that is being made; it counts once the tensor is `add`ed."""
        with self._lock:
            place = Place(dtypes.NAMES[tensor.dtype], tuple(tensor.shape), self._spool.tell())
            self._spool.write(dtypes.raw_bytes(tensor).numpy().data)
            self._spool.flush()
        return place

    def add(self, record: Record) -> None:
        """Note a finished tensor, all of whose parts were `put`."""
        with self._lock:
            self._line({"record": asdict(record)})
            self.done[record.name] = record

    def drop(self, names: Collection[str], stamps: Any) -> None:
        """Forget tensors whose inputs changed; the others are of inputs that have `stamps` now."""
        with self._lock:
            self._line({"dropped": sorted(names), "stamps": stamps})
            for name in names:
                del self.done[name]
            self.stamps, self.resumed = stamps, len(self.done)

    def part(self, place: Place) -> torch.Tensor:
        """Read one part back; what was torn off comes as zeros, and its checksum will say so."""
        dtype = dtypes.TORCH[place.dtype]
        if not place.nbytes:
            return torch.empty(place.shape, dtype=dtype)
        raw = torch.zeros(place.nbytes, dtype=torch.uint8)
        view, count = memoryview(raw.numpy().data), 0
        while more := os.preadv(self._spool.fileno(), [view[count:]], place.start + count):
            count += more
        return raw.view(dtype).reshape(place.shape)

    def pieces(self, place: Place) -> list[torch.Tensor]:
        """One part read back, as those take it that write tensors in pieces."""
        return [self.part(place)]

    def reader(self, places: Mapping[str, Place]) -> Mapping[str, torch.Tensor]:
        """Parts by name, each read when it is asked for."""
        return _Parts(self, places)

    def _line(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, separators=(",", ":"))
        self._journal.write(f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
        self._journal.flush()

    def _read(self, identity: str) -> tuple[int, int]:
        """Bytes of the journal and of the spool that are worth keeping."""
        try:
            raw = self._journal_path.read_bytes()
        except OSError:
            return 0, 0
        kept = end = 0
        for line in raw.splitlines(keepends=True):
            content = _parsed(line)
            if content is None or (not kept and content.get("identity") != identity):
                break
            kept += len(line)
            self.stamps = content.get("stamps", self.stamps)
            for name in content.get("dropped", ()):
                self.done.pop(name, None)
            if "record" in content:
                record = _record(content["record"])
                self.done[record.name] = record
                end = max(
                    end, *(p.start + p.nbytes for parts in record.parts for p in parts.values()), 0
                )
        return kept, end

    def _sound(self, record: Record) -> bool:
        """Whether every part is in the spool as it was written."""
        if record.entry is None:
            return True
        parts = [self.reader(places) for places in record.parts]
        return bool(payload_digest(parts) == record.entry["payload_sha256"])

    @staticmethod
    def _open(path: Path, size: int) -> BinaryIO:
        path.touch()
        file = path.open("r+b")
        # What follows the last whole line belongs to nobody.
        if path.stat().st_size > size:
            file.truncate(size)
        file.seek(0, os.SEEK_END)
        return file


def is_journal(path: Path) -> bool:
    """Whether a file is a journal's own."""
    return path.name in (_JOURNAL, _SPOOL)


def is_resumable(folder: Path) -> bool:
    """Whether a run of the same inputs and settings would go on with what was finished here."""
    try:
        with (folder / _JOURNAL).open("rb") as file:
            first, second = _parsed(file.readline()), _parsed(file.readline())
    except OSError:
        return False
    named = first is not None and bool(first.get("identity"))
    return named and second is not None and "record" in second


def clear(folder: Path) -> None:
    """Remove what a run that was cut short left, but for its journal."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not is_journal(path):
            path.unlink()


def discard(folder: Path) -> None:
    """Remove the journal: the folder has everything now."""
    for name in (_JOURNAL, _SPOOL):
        (folder / name).unlink(missing_ok=True)


class _Parts(Mapping[str, torch.Tensor]):
    """Parts of one term in the spool."""

    def __init__(self, journal: Journal, places: Mapping[str, Place]) -> None:
        self._journal, self._places = journal, places

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._journal.part(self._places[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _parsed(line: bytes) -> dict[str, Any] | None:
    crc, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or crc != f"{zlib.crc32(text):08x}".encode():
        return None
    content = json.loads(text)
    return content if isinstance(content, dict) else None


def _record(data: Mapping[str, Any]) -> Record:
    parts = tuple(
        {k: Place(p["dtype"], tuple(p["shape"]), p["start"]) for k, p in places.items()}
        for places in data["parts"]
    )
    return Record(**{**data, "parts": parts})
