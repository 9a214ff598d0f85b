"""Writing tensors to `STEM.safetensors`, or to numbered shards with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from deltafold.compress.safetensors_file import Deferred, file_head, write_file

#: Bytes of a delta's shard.
SHARD_BYTES: Final = 2**30


def planned_bytes(
    parts: Iterable[tuple[str, torch.dtype, Sequence[int]]],
    stem: str,
    metadata: Mapping[str, str],
    *,
    max_bytes: int = SHARD_BYTES,
) -> int:
    """Bytes of all files that a `ShardWriter` would make of parts in this order, index included.

    Args:
        parts: key, dtype and shape of each.
        stem, metadata, max_bytes: as for `ShardWriter`.
    """
    shards: list[dict[str, tuple[torch.dtype, Sequence[int]]]] = [{}]
    pending = payload = 0
    for key, dtype, shape in parts:
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and pending + nbytes > max_bytes:
            shards.append({})
            pending = 0
        shards[-1][key] = (dtype, shape)
        pending += nbytes
        payload += nbytes
    total = payload + sum(len(file_head(shard, metadata)[0]) for shard in shards)
    return total + len(_index(stem, [list(s) for s in shards], payload)) * (len(shards) > 1)


def shard_name(stem: str, number: int, count: int) -> str:
    """The file name of one of `count` shards, counted from 0."""
    return f"{stem}-{number + 1:05}-of-{count:05}.safetensors"


def _index(stem: str, shards: Sequence[Sequence[str]], total: int) -> bytes:
    weight_map = {
        key: shard_name(stem, number, len(shards))
        for number, keys in enumerate(shards)
        for key in keys
    }
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


class ShardWriter:
    """Collects tensors and writes a shard whenever enough have come together.

    Tensors that are deferred are made one at a time while their shard is written.

    Args:
        folder: where to write.
        stem: "delta" or "model".
        metadata: goes to every shard's header.
        max_bytes: a shard's size; also what the writer holds in memory at most, besides one tensor,
            of those that are not deferred.
    """

    def __init__(
        self, folder: Path, stem: str, metadata: dict[str, str], *, max_bytes: int = SHARD_BYTES
    ) -> None:
        self._folder, self._stem, self._metadata = folder, stem, metadata
        self._max_bytes = max_bytes
        self._pending: dict[str, Deferred] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, key: str, tensor: torch.Tensor | Deferred) -> None:
        """Write a tensor, sooner or later."""
        deferred = tensor if isinstance(tensor, Deferred) else Deferred.of(tensor.contiguous())
        nbytes = deferred.nbytes
        if self._pending and self._pending_bytes + nbytes > self._max_bytes:
            self._flush()
        self._pending[key] = deferred
        self._pending_bytes += nbytes
        self.total_bytes += nbytes

    def finish(self) -> list[Path]:
        """Write what is left, give the shards their final names, and return all files."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            path = self._folder / f"{self._stem}.safetensors"
            self._temporary(0).rename(path)
            return [path]
        paths: list[Path] = []
        for i in range(count):
            path = self._folder / shard_name(self._stem, i, count)
            self._temporary(i).rename(path)
            paths.append(path)
        index = self._folder / f"{self._stem}.safetensors.index.json"
        index.write_bytes(_index(self._stem, self._shards, self.total_bytes))
        return [*paths, index]

    def _temporary(self, index: int) -> Path:
        # The count is in the final name, and it is not known before the end.
        return self._folder / f".{self._stem}-{index}"

    def _flush(self) -> None:
        write_file(self._temporary(len(self._shards)), self._pending, self._metadata)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
