"""One safetensors file: its header checked, its tensors read when asked for; and a writer.

The header is read by ourselves, so that a truncated or hostile file is refused with its reason before
any tensor is touched, and so that a tensor's bytes can be hashed without decoding them.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from deltafold.compress import dtypes
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.shapes import rows_and_columns

#: The format's own limit on headers.
_MAX_HEADER = 100_000_000
#: Bytes that are hashed at a time.
_CHUNK = 2**20


class Hash(Protocol):
    """What `hashlib` gives."""

    def update(self, data: Any, /) -> None:
        """Take more bytes."""
        ...

    def hexdigest(self) -> str:
        """The digest of all of them."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: safetensors dtype name, shape, and byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file whose header was read and checked.

    Raises:
        DeltafoldError: `truncated` where the file ends too early, `code` (what the caller names) for
            anything else that is not a sound safetensors file.
    """

    def __init__(self, path: Path, *, code: str = "not-a-checkpoint") -> None:
        self.path, self._code = path, code
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(8)
                length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
                if not 0 <= length <= _MAX_HEADER:
                    raise self._bad("it does not begin like a safetensors file")
                raw = file.read(length)
        except OSError as error:
            raise DeltafoldError("not-found", f"{path}: {error.strerror}.") from error
        if len(raw) < length:
            raise self._truncated(8 + length)
        self._offset = 8 + length
        self.metadata: dict[str, str] = {}
        self.entries = self._parse(raw)
        self._held: mmap.mmap | None = None

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype, in memory of its own."""
        entry = self.entries[name]
        dtype = dtypes.to_torch(entry.dtype, where=f"{self.path.name}: {name}")
        if not math.prod(entry.shape):
            return torch.empty(entry.shape, dtype=dtype)
        return self.read(name, 0, entry.stop - entry.start).view(dtype).reshape(entry.shape)

    def matrix_rows(
        self,
        name: str,
        start: int,
        stop: int,
        out: torch.Tensor | None = None,
        total: Hash | None = None,
    ) -> torch.Tensor:
        """Rows of a tensor read as a matrix (see `rows_and_columns`).

        Args:
            name: the tensor.
            start: the first row.
            stop: behind the last.
            out: uint8 1-D, at least as long as the rows, to read into; memory of their own if None.
            total: is told the bytes as they come, while they are still in the processor's cache.

        Returns:
            `[stop - start, M]` in the tensor's own dtype.
        """
        entry = self.entries[name]
        dtype = dtypes.to_torch(entry.dtype, where=f"{self.path.name}: {name}")
        columns = rows_and_columns(entry.shape)[1]
        width = dtype.itemsize * columns
        if start >= stop or not columns:
            return torch.empty((max(stop - start, 0), columns), dtype=dtype)
        raw = self.read(name, start * width, stop * width, out, total)
        return raw.view(dtype).reshape(-1, columns)

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes."""
        entry = self.entries[name]
        return entry.stop - entry.start

    def sha256(self, name: str) -> str:
        """Hex digest of a tensor's bytes."""
        entry, total = self.entries[name], hashlib.sha256()
        size = entry.stop - entry.start
        room = torch.empty(min(size, _CHUNK), dtype=torch.uint8)
        for start in range(0, size, _CHUNK):
            self.read(name, start, min(start + _CHUNK, size), room, total)
        return total.hexdigest()

    def stamp(self) -> tuple[int, int, int, int]:
        """Size, modification and change times (ns) and inode of the file as it is now.

        Raises:
            DeltafoldError: `not-found` where the file is gone.
        """
        try:
            stat = self.path.stat()
        except OSError as error:
            raise DeltafoldError("not-found", f"{self.path}: {error.strerror}.") from error
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino

    def read(
        self,
        name: str,
        start: int,
        stop: int,
        out: torch.Tensor | None = None,
        total: Hash | None = None,
    ) -> torch.Tensor:
        """Bytes `start` to `stop` of a tensor, uint8 1-D, in `out` or in memory of their own.

        Read, not mapped: pages of a map count as this process's memory for as long as they are
        cached, and a file that shrinks meanwhile would kill the process instead of raising.

        Raises:
            DeltafoldError: `truncated` or `not-found` where the file is no longer what it was.
        """
        entry = self.entries[name]
        assert 0 <= start <= stop <= entry.stop - entry.start
        out = torch.empty(stop - start, dtype=torch.uint8) if out is None else out[: stop - start]
        view, first, done = memoryview(out.numpy().data), entry.start + start, 0
        if self._held is not None:
            if self._held.size() < first + len(
                view
            ):  # shortened since; a map would kill the process
                raise self._truncated(first + len(view))
            # NumPy lets other threads run while it copies; slices of a memoryview do not.
            np.copyto(out.numpy(), np.frombuffer(self._held, np.uint8, len(view), first))
            _let_go(self._held, first, first + len(view))
            if total is not None:
                total.update(view)
            return out
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(first)
                while done < len(view):
                    room = view[done:] if total is None else view[done : done + _CHUNK]
                    count = file.readinto(room)
                    if not count:
                        break
                    if total is not None:
                        total.update(room[:count])
                    done += count
        except OSError as error:
            raise DeltafoldError("not-found", f"{self.path}: {error.strerror}.") from error
        if done < len(view):
            raise self._truncated(entry.start + stop)
        return out

    def hold(self) -> None:
        """Map the file now: it can then be read to the end even if its name goes meanwhile.

        For files that nobody shortens and that are replaced whole, as the payloads of deltas are.
        """
        if self._held is None and self.size:
            with self.path.open("rb") as file:
                self._held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def _parse(self, raw: bytes) -> dict[str, Entry]:
        try:
            header = json.loads(raw, object_pairs_hook=_no_duplicates)
            metadata = header.pop("__metadata__", {})
            self.metadata = {str(k): str(v) for k, v in metadata.items()}
            entries = {str(name): self._entry(str(name), e) for name, e in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, DeltafoldError):
                raise
            raise self._bad(f"its header cannot be read ({error})") from error
        end = max((e.stop for e in entries.values()), default=self._offset)
        if end > self.size:
            raise self._truncated(end)
        if end < self.size:
            raise self._bad(f"{self.size - end} bytes follow its last tensor")
        self._no_overlap(entries)
        return entries

    def _entry(self, name: str, data: Any) -> Entry:
        start, stop = (_whole(n) for n in data["data_offsets"])
        shape = tuple(_whole(n) for n in data["shape"])
        dtype = str(data["dtype"])
        if not 0 <= start <= stop or any(n < 0 for n in shape):
            raise self._bad(f"{name} has impossible offsets or shape")
        where = f"{self.path.name}: {name}"
        expected = dtypes.to_torch(dtype, where=where, code=self._code).itemsize
        for n in shape:
            expected *= n
        if stop - start != expected:
            raise self._bad(f"{name} has {stop - start} bytes where its shape needs {expected}")
        return Entry(dtype, shape, self._offset + start, self._offset + stop)

    def _no_overlap(self, entries: dict[str, Entry]) -> None:
        position = self._offset
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != position:
                raise self._bad(f"{name} overlaps its neighbour or leaves a hole")
            position = entry.stop

    def _bad(self, why: str) -> DeltafoldError:
        return DeltafoldError(self._code, f"{self.path} is not a sound safetensors file: {why}.")

    def _truncated(self, expected: int) -> DeltafoldError:
        return DeltafoldError(
            "truncated",
            f"{self.path} ends too early.",
            facts=[("expected", f"{expected} bytes"), ("found", f"{self.size} bytes")],
            fix="copy or download the file again",
        )


def file_head(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """What stands before the tensors' bytes, and the order in which these follow.

    Args:
        tensors: dtype and shape by name; nothing else decides the size of a file.
        metadata: goes to the header.
    """
    # Wide dtypes first, as the library does: every tensor then begins at a multiple of its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        stop = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": dtypes.NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, stop],
        }
        position = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, order


@dataclass(frozen=True, slots=True)
class Deferred:
    """A tensor that is made when it is written: dtype and shape, and who makes it, in pieces that
    follow each other in memory order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Iterable[torch.Tensor]]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Deferred:
        """A tensor that is there already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_file(
    path: Path, tensors: Mapping[str, torch.Tensor | Deferred], metadata: Mapping[str, str]
) -> None:
    """Write tensors to a file whose bytes depend on nothing but its content.

    Of those that are deferred one piece is held at a time. The library's own writer puts metadata in an
    order of chance, reports a full disk as an error that is no `OSError`, and makes a file that other
    users cannot read.
    """
    deferred = {n: t if isinstance(t, Deferred) else Deferred.of(t) for n, t in tensors.items()}
    head, order = file_head({n: (t.dtype, t.shape) for n, t in deferred.items()}, metadata)
    with path.open("wb") as file:
        file.write(head)
        for name in order:
            promised, left = deferred[name], deferred[name].nbytes
            for piece in promised.load():
                assert piece.dtype == promised.dtype, name
                left -= file.write(dtypes.raw_bytes(piece).numpy().data)
            assert not left, f"{name}: {left} bytes are missing"


def _let_go(held: mmap.mmap, start: int, stop: int) -> None:
    """Give pages of a map back to the system: until then they count as memory of this process."""
    if hasattr(mmap, "MADV_DONTNEED"):
        start -= start % mmap.PAGESIZE
        held.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise TypeError(f"{number!r} is not a whole number")
    return number


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
