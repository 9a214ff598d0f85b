"""A Hugging Face checkpoint, read lazily: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.hub import Reference, resolve
from deltafold.compress.safetensors_file import Hash, SafetensorsFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Spec(NamedTuple):
    """A tensor's safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Something that has a model's tensors: a checkpoint on disk, or a delta beside its base."""

    reference: Reference

    def names(self) -> list[str]:
        """Sorted tensor names."""
        ...

    def spec(self, name: str) -> Spec:
        """Dtype and shape, without reading the tensor."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype."""
        ...

    def sha256(self, name: str) -> str:
        """Hex digest of the tensor's bytes."""
        ...


class Checkpoint:
    """A folder with `config.json` and safetensors weights.

    Raises:
        DeltafoldError: `not-found`, `not-a-checkpoint`, or `truncated`.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.folder = reference.folder
        self.files = [SafetensorsFile(path) for path in self._paths()]
        self._home: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self._home:
                    raise DeltafoldError(
                        "not-a-checkpoint",
                        f"{name} is in both {self._home[name].path.name} and {file.path.name}.",
                    )
                self._home[name] = file

    @classmethod
    def open(cls, reference: str | Path | Reference) -> Checkpoint:
        """Open a folder or hub id."""
        return cls(reference if isinstance(reference, Reference) else resolve(reference))

    def names(self) -> list[str]:
        """Sorted tensor names."""
        return sorted(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def spec(self, name: str) -> Spec:
        """Dtype and shape, without reading the tensor."""
        entry = self._home[name].entries[name]
        return Spec(entry.dtype, entry.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype, in memory of its own."""
        return self._home[name].tensor(name)

    def matrix_rows(
        self,
        name: str,
        start: int,
        stop: int,
        out: torch.Tensor | None = None,
        total: Hash | None = None,
    ) -> torch.Tensor:
        """Rows of a tensor read as a matrix, `[stop - start, M]`; see `SafetensorsFile`."""
        return self._home[name].matrix_rows(name, start, stop, out, total)

    def sha256(self, name: str) -> str:
        """Hex digest of the tensor's bytes."""
        return self._home[name].sha256(name)

    def stamps(self, names: Collection[str] | None = None) -> dict[str, tuple[int, int, int, int]]:
        """By file name what tells that a weights file was changed (see `SafetensorsFile.stamp`).

        Args:
            names: tensors whose files are asked for; all if None.
        """
        files = self.files if names is None else [self._home[name] for name in names]
        return {file.path.name: file.stamp() for file in files}

    def nbytes(self, name: str | None = None) -> int:
        """Bytes of a tensor, of all if None."""
        if name is not None:
            return self._home[name].nbytes(name)
        return sum(e.stop - e.start for file in self.files for e in file.entries.values())

    def _paths(self) -> list[Path]:
        if not (self.folder / "config.json").is_file():
            raise self._not_one("it has no config.json")
        # Where both are there, transformers loads the single file too.
        if (self.folder / _SINGLE).is_file():
            return [self.folder / _SINGLE]
        index = self.folder / _INDEX
        if index.is_file():
            return self._sharded(index)
        raise self._not_one(f"it has neither {_SINGLE} nor {_INDEX}")

    def _sharded(self, index: Path) -> list[Path]:
        try:
            shards = sorted(
                {str(s) for s in json.loads(index.read_text("utf-8"))["weight_map"].values()}
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._not_one(f"{_INDEX} cannot be read ({error})") from error
        if any(Path(s).name != s for s in shards):
            raise self._not_one(f"{_INDEX} names files outside the folder")
        missing = [s for s in shards if not (self.folder / s).is_file()]
        if missing:
            raise self._not_one(f"{name_some(missing, len(shards))} of its shards are missing")
        return [self.folder / s for s in shards]

    def _not_one(self, why: str) -> DeltafoldError:
        others = sorted(p.name for p in self.folder.glob("*.bin"))
        fix = "give a Hugging Face checkpoint folder with safetensors weights"
        if others:
            fix = (
                "convert the pickled weights first: AutoModel.from_pretrained(F).save_pretrained(F)"
            )
        if (self.folder / "delta_config.json").is_file():
            fix = "this is a delta repo; `deltafold restore` makes a checkpoint of it"
        return DeltafoldError(
            "not-a-checkpoint", f"{self.folder} is not a checkpoint: {why}.", fix=fix
        )
