"""Rebuilding a full checkpoint from a delta and its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import Checkpoint, Spec
from deltafold.compress.companions import copy_files, named
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.fingerprint import digest_source
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.rebuild import restored_pieces
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.safetensors_file import Deferred
from deltafold.compress.shards import ShardWriter
from deltafold.compress.staging import Staging
from deltafold.compress.verify import check_coverage


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """The outcome: tensors written, and how many of them have the fine-tune's own sha256."""

    out: Path
    tensors: int
    exact: int
    nbytes: int


def restore_checkpoint(
    delta: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: OnProgress = ignore,
) -> RestoreReport:
    """Write the fine-tune as an ordinary Hugging Face checkpoint.

    Exactly stored tensors are checked against the fine-tune's sha256. Lossy ones are rounded to
    their own dtype, or to `dtype` for all floating-point tensors.

    Raises:
        DeltafoldError: whatever is wrong with delta or base, before `out` exists.
    """
    repo = DeltaRepo.open(delta)
    source = Checkpoint.open(base)
    digests = digest_source(source)
    repo.check_base(digests, given=source.reference.name)
    check_coverage(repo, digests)
    names, inputs = repo.variant_names(), (source.folder, repo.folder)
    with Staging(Path(out), overwrite=overwrite, inputs=inputs) as staging:
        writer = ShardWriter(staging.folder, "model", {"format": "pt"}, max_bytes=4 * 2**30)
        run = _Run(repo, source, dtype, len(names), progress)
        for name in names:
            writer.add(name, run.deferred(name))
        writer.finish()
        _copy_companions(repo, source, staging.folder)
        if dtype is not None:
            _say_dtype(staging.folder / "config.json", dtype)
        staging.publish()
    return RestoreReport(Path(out), len(names), run.exact, writer.total_bytes)


@dataclass
class _Run:
    """Tensors made one at a time, as the writer comes to them.

    Attributes:
        done: tensors made so far.
        exact: how many of them are the fine-tune's bit for bit.
    """

    repo: DeltaRepo
    source: Checkpoint
    dtype: torch.dtype | None
    total: int
    progress: OnProgress
    done: int = 0
    exact: int = 0

    def deferred(self, name: str) -> Deferred:
        """A tensor's dtype and shape, and how it is made."""
        entry = self.repo.manifest.tensors.get(name)
        if entry is None:
            spec = self.repo.named(self.source).spec(name)
        else:
            spec = Spec(entry.dtype, tuple(entry.shape))
        dtype = dtypes.TORCH[spec.dtype]
        if self.dtype is not None and dtype.is_floating_point:
            dtype = self.dtype
        return Deferred(dtype, spec.shape, partial(self._make, name, dtypes.TORCH[spec.dtype]))

    def _make(self, name: str, own: torch.dtype) -> Iterator[torch.Tensor]:
        size = 0
        for piece in restored_pieces(self.repo, self.source, name, self.dtype):
            size += piece.numel() * piece.element_size()
            yield piece
        same = self.dtype in (None, own) or not own.is_floating_point
        self.exact += same and (name not in self.repo.manifest.tensors or self.repo.exact(name))
        self.done += 1
        self.progress(Progress("restore", name, self.done, self.total, size))


def _say_dtype(path: Path, dtype: torch.dtype) -> None:
    """Name the new dtype where the configuration names the old one, or loaders would cast back."""
    config = json.loads(path.read_text("utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def own_companions(repo: DeltaRepo) -> dict[str, Path]:
    """The fine-tune's small files; one that the manifest does not list is none of them."""
    return {n: p for n, p in named(repo.folder).items() if n in repo.manifest.files}


def _copy_companions(repo: DeltaRepo, source: Checkpoint, folder: Path) -> None:
    copy_files(own_companions(repo), folder)
    if not (folder / "config.json").is_file():
        raise DeltafoldError("not-a-delta", f"{repo.folder} has no config.json.")
