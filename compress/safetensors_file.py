"""One safetensors file: its header checked, its tensors read when asked for; and a writer.

The header is read by ourselves, so that a truncated or hostile file is refused with its reason before
any tensor is touched, and so that a tensor's bytes can be hashed without decoding them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltafold.compress import dtypes
from deltafold.compress.errors import DeltafoldError

#: The format's own limit on headers.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: safetensors dtype name, shape, and byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A memory-mapped safetensors file.

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
        self._map: NDArray[np.uint8] | None = None

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, uint8 1-D, mapped and read-only."""
        entry = self.entries[name]
        if entry.start == entry.stop:
            return np.empty(0, dtype=np.uint8)
        return self.hold()[entry.start : entry.stop]

    def hold(self) -> NDArray[np.uint8]:
        """Map the file now: it can then be read to the end even if its name goes meanwhile."""
        if self._map is None:
            self._map = np.memmap(self.path, dtype=np.uint8, mode="r")
        return self._map

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype, in memory of its own."""
        entry = self.entries[name]
        raw = torch.from_numpy(np.array(self.bytes_of(name)))
        dtype = dtypes.to_torch(entry.dtype, where=f"{self.path.name}: {name}")
        if not raw.numel():
            return torch.empty(entry.shape, dtype=dtype)
        return raw.view(dtype).reshape(entry.shape)

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


def write_file(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors to a file whose bytes depend on nothing but its content.

    The library's own writer puts metadata in an order of chance, reports a full disk as an error
    that is no `OSError`, and makes a file that other users cannot read.
    """
    head, order = file_head({n: (t.dtype, t.shape) for n, t in tensors.items()}, metadata)
    with path.open("wb") as file:
        file.write(head)
        for name in order:
            file.write(dtypes.raw_bytes(tensors[name]).numpy().data)


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise TypeError(f"{number!r} is not a whole number")
    return number


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
