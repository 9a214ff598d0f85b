"""Rebuilding a full checkpoint from a delta and its base."""

from __future__ import annotations

import json
import math
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
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.safetensors_file import Deferred
from deltafold.compress.shards import ShardWriter
from deltafold.compress.staging import Staging
from deltafold.compress.verify import check_coverage, not_restored


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
        return Deferred(dtype, spec.shape, partial(self._make, name))

    def _make(self, name: str) -> torch.Tensor:
        tensor, checked = restored_tensor(self.repo, self.source, name, self.dtype)
        self.done += 1
        self.exact += checked
        size = math.prod(tensor.shape) * tensor.element_size()
        self.progress(Progress("restore", name, self.done, self.total, size))
        return tensor


def restored_tensor(
    repo: DeltaRepo, source: Checkpoint, name: str, dtype: torch.dtype | None
) -> tuple[torch.Tensor, bool]:
    """One tensor of the fine-tune, and whether it is known to be so bit for bit.

    Args:
        repo: the delta.
        source: its base.
        name: one of the fine-tune's tensors.
        dtype: what floating-point tensors are rounded to; None for their own.

    Raises:
        DeltafoldError: `checksum`, or `not-lossless` where exactly stored bytes came back different.
    """
    base = repo.base_tensor(source, name)
    if name not in repo.manifest.tensors:
        assert base is not None
        tensor, checked = base, True
    elif repo.exact(name):
        tensor, checked = repo.restored(name, base), True
        digest = dtypes.sha256(tensor)
        if digest != repo.entry(name).sha256:
            raise not_restored(repo, name)
    elif dtype is not None:
        # Straight from float32, without a rounding to the fine-tune's dtype in between.
        delta = repo.delta(name, base)
        tensor, checked = _on_top(base, delta), False
    else:
        tensor, checked = repo.restored(name, base), False
    if dtype is not None and tensor.is_floating_point():
        return tensor.to(dtype), checked and tensor.dtype == dtype
    return tensor, checked


def _say_dtype(path: Path, dtype: torch.dtype) -> None:
    """Name the new dtype where the configuration names the old one, or loaders would cast back."""
    config = json.loads(path.read_text("utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _on_top(base: torch.Tensor | None, delta: torch.Tensor) -> torch.Tensor:
    if base is None:
        return delta
    rows = min(base.shape[0], delta.shape[0])
    delta[:rows] += base[:rows].to(torch.float32)
    return delta


def own_companions(repo: DeltaRepo) -> dict[str, Path]:
    """The fine-tune's small files; one that the manifest does not list is none of them."""
    return {n: p for n, p in named(repo.folder).items() if n in repo.manifest.files}


def _copy_companions(repo: DeltaRepo, source: Checkpoint, folder: Path) -> None:
    copy_files(own_companions(repo), folder)
    if not (folder / "config.json").is_file():
        raise DeltafoldError("not-a-delta", f"{repo.folder} has no config.json.")
