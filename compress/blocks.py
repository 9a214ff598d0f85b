"""Rows and columns that something else has computed, as a delta.

Methods that carry knowledge over between models of different sizes (LaTen, arXiv 2505.14436, say) end
in steps on chosen rows or columns of the smaller model's matrices. How they find them is theirs; the
result is a delta like any other, and the manifest says that it was produced outside.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import Checkpoint, Spec
from deltafold.compress.companions import named
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.fingerprint import digest_source
from deltafold.compress.hub import Reference
from deltafold.compress.methods import LosslessMethod
from deltafold.compress.naming import NamedBase
from deltafold.compress.pipeline import Job, PackReport, pack
from deltafold.compress.progress import OnProgress, ignore
from deltafold.compress.recipe import Recipe
from deltafold.compress.safetensors_file import SafetensorsFile
from deltafold.compress.terms import Columns, Context, Dense, Encoded, Rows

Axis: TypeAlias = Literal["rows", "columns"]
_AXES: Final[tuple[Axis, ...]] = ("rows", "columns")
_WHOLE: Final = frozenset({"I64", "I32", "I16", "I8", "U8"})


def import_blocks(
    base: str | Path,
    file: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    command: str = "",
    progress: OnProgress = ignore,
) -> PackReport:
    """Write steps on rows and columns as a delta repo.

    Args:
        base: folder or hub id of the base checkpoint.
        file: a safetensors file. For a tensor T of the base it holds `T.rows.index` (whole numbers
            `[k]`) and `T.rows.values` (`[k, ...]`, added to those rows), or `T.columns.index` and
            `T.columns.values` (`[N, k]`, added to those columns of a matrix), or all four.
        out: the delta repo to write; nothing stands there until it is whole and verified.
        overwrite: replace an existing `out`.
        command: recorded in the manifest and card.
        progress: called after every tensor.

    Raises:
        DeltafoldError: `unexpected-tensor`, `coverage`, `shape-mismatch`, `bad-argument`,
            `not-finite`; all of it before anything stands under `out`.
    """
    source = Checkpoint.open(base)
    target = BlockSource(Path(file), source)
    record = {
        "default": "blocks",
        "vectors": "blocks",
        "tensors": {},
        "provenance": {
            "produced": "outside",
            "file": target.file.path.name,
            "sha256": target.digest,
        },
    }
    job = Job(
        NamedBase(source),
        target,
        named(source.folder),
        Recipe(default=LosslessMethod()),
        command=command,
        progress=progress,
        given=target.given,
        record=record,
    )
    return pack(job, out, overwrite=overwrite)


@dataclass(frozen=True, slots=True)
class Block:
    """A step on some rows or columns: ascending int64 `[k]`, float32 values."""

    axis: Axis
    index: torch.Tensor
    values: torch.Tensor


class BlockSource:
    """The base with the steps of a file added, rounded to the base's dtypes.

    Attributes:
        file: where the steps come from.
        digest: hex sha256 of that file.

    Raises:
        DeltafoldError: what is wrong with the file, see `import_blocks`.
    """

    def __init__(self, path: Path, base: Checkpoint) -> None:
        if not path.is_file():
            raise DeltafoldError(
                "not-found", f"{path} is not a file.", fix="give a safetensors file"
            )
        self.file = SafetensorsFile(path)
        with path.open("rb") as opened:
            self.digest = hashlib.file_digest(opened, "sha256").hexdigest()
        self.reference = Reference(base.folder, path.stem)
        self._base = base
        self._digests = digest_source(base)
        self._axes = self._sorted_keys()
        for name, axes in self._axes.items():
            for axis in axes:
                self._block(name, axis)

    def names(self) -> list[str]:
        """Sorted tensor names: the base's."""
        return self._base.names()

    def spec(self, name: str) -> Spec:
        """Dtype and shape: the base's."""
        return self._base.spec(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor with its steps added, in the base's dtype."""
        value, given = self._base.tensor(name), self.given(name)
        if given is None:
            return value
        return (value.to(torch.float32) + given[1]).to(value.dtype)

    def sha256(self, name: str) -> str:
        """Hex digest of the tensor's bytes."""
        if name not in self._axes:
            return self._digests[name].sha256
        return dtypes.sha256(self.tensor(name))

    def given(self, name: str) -> tuple[list[Encoded], torch.Tensor] | None:
        """The terms of a tensor's steps and their float32 sum; None where there are none."""
        delta = torch.zeros(self.spec(name).shape) if name in self._axes else None
        if delta is None:
            return None
        encoded = []
        for axis in self._axes[name]:
            block = self._block(name, axis)
            step = torch.zeros_like(delta)
            if axis == "rows":
                step[block.index] = block.values
            else:
                step[:, block.index] = block.values
            if bool(step.any()):
                term = Rows(inner=Dense()) if axis == "rows" else Columns(inner=Dense())
                encoded.append(term.encode(step, Context(name)))
                delta += step
        return (encoded, delta) if encoded else None

    def _sorted_keys(self) -> dict[str, list[Axis]]:
        """The axes of each tensor that has steps. Every key of the file is accounted for."""
        keys, found = set(self.file.entries), dict[str, list[Axis]]()
        for key in sorted(keys):
            name, axis, part = ([*key.rsplit(".", 2), "", ""])[:3]
            if axis not in _AXES or part not in ("index", "values") or name not in self._base:
                raise DeltafoldError(
                    "unexpected-tensor",
                    f"{self.file.path} has a tensor that an import would lose.",
                    facts=[("unexpected", key), ("base", self._base.reference.name)],
                    fix="name them TENSOR.rows.index, TENSOR.rows.values, TENSOR.columns.index and "
                    "TENSOR.columns.values, after the base's tensors",
                )
        for name in sorted({key.rsplit(".", 2)[0] for key in keys}):
            for axis in _AXES:
                halves = {f"{name}.{axis}.index", f"{name}.{axis}.values"}
                if halves & keys and not halves <= keys:
                    raise DeltafoldError(
                        "coverage",
                        f"{self.file.path} has an index without values, or values without an index.",
                        facts=[("missing", ", ".join(halves - keys))],
                    )
                if halves <= keys:
                    found.setdefault(name, []).append(axis)
        return found

    def _block(self, name: str, axis: Axis) -> Block:
        index_key, values_key = f"{name}.{axis}.index", f"{name}.{axis}.values"
        self._check_shapes(name, axis, index_key, values_key)
        index = self.file.tensor(index_key).to(torch.int64)
        values = self.file.tensor(values_key).to(torch.float32)
        size = self.spec(name).shape[0 if axis == "rows" else 1]
        order = index.argsort()
        index = index[order]
        values = (values[order] if axis == "rows" else values[:, order]).contiguous()
        if bool((index[1:] == index[:-1]).any()):
            raise DeltafoldError("bad-argument", f"{index_key} names one of the {axis} twice.")
        if index.numel() and not (index[0] >= 0 and index[-1] < size):
            raise DeltafoldError(
                "shape-mismatch",
                f"{index_key} reaches beyond the base's tensor.",
                facts=[(axis, size), ("found", f"{int(index[0])} to {int(index[-1])}")],
            )
        if not bool(torch.isfinite(values).all()):
            raise DeltafoldError("not-finite", f"{values_key} has NaN or infinite entries.")
        return Block(axis, index, values)

    def _check_shapes(self, name: str, axis: Axis, index_key: str, values_key: str) -> None:
        spec, index, values = self.spec(name), *map(self.file.entries.get, (index_key, values_key))
        assert index is not None
        assert values is not None
        count = index.shape[0] if index.shape else -1
        shape = (count, *spec.shape[1:]) if axis == "rows" else (*spec.shape[:1], count)
        fits = len(spec.shape) >= 1 if axis == "rows" else len(spec.shape) == 2
        fits = fits and len(index.shape) == 1 and values.shape == shape
        if not (fits and index.dtype in _WHOLE and {spec.dtype, values.dtype} <= dtypes.FLOATS):
            raise DeltafoldError(
                "shape-mismatch",
                f"{self.file.path}: the {axis} of {name} do not fit the base's tensor.",
                facts=[
                    ("base", f"{spec.dtype} {list(spec.shape)}"),
                    ("index", f"{index.dtype} {list(index.shape)}"),
                    ("values", f"{values.dtype} {list(values.shape)}"),
                ],
                fix="an index is a list of whole numbers; values have floats, [k, ...] for rows and "
                "[N, k] for columns of a matrix",
            )
