"""Writing tensors to `STEM.safetensors`, or to numbered shards with an index."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from deltafold.compress.safetensors_file import Deferred, write_file


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
        self, folder: Path, stem: str, metadata: dict[str, str], *, max_bytes: int = 2**30
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
        weight_map: dict[str, str] = {}
        for i, keys in enumerate(self._shards):
            path = self._folder / f"{self._stem}-{i + 1:05}-of-{count:05}.safetensors"
            self._temporary(i).rename(path)
            weight_map |= dict.fromkeys(keys, path.name)
            paths.append(path)
        index = self._folder / f"{self._stem}.safetensors.index.json"
        content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
        return [*paths, index]

    def _temporary(self, index: int) -> Path:
        # The count is in the final name, and it is not known before the end.
        return self._folder / f".{self._stem}-{index}"

    def _flush(self) -> None:
        write_file(self._temporary(len(self._shards)), self._pending, self._metadata)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
