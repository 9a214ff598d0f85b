"""A fine-tune to be packed: a checkpoint, or a lossless delta that stands for one."""

from __future__ import annotations

from pathlib import Path

import torch

from deltafold.compress.adapter import CONFIG_NAME
from deltafold.compress.checkpoint import Checkpoint, Spec, TensorSource
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.fingerprint import digest_source
from deltafold.compress.hub import resolve
from deltafold.compress.manifest import MANIFEST_NAME
from deltafold.compress.repo import DeltaRepo


class RestoredSource:
    """The fine-tune behind a lossless delta, its tensors rebuilt when asked for.

    Raises:
        DeltafoldError: `base-mismatch`; `not-lossless` where a tensor would not come back exactly.
    """

    def __init__(self, repo: DeltaRepo, base: Checkpoint) -> None:
        if not repo.lossless:
            raise DeltafoldError(
                "not-lossless",
                f"{repo.folder} is a lossy delta; it cannot stand for its fine-tune.",
                fix="pack from the full checkpoint, or from a delta made with --codec lossless",
            )
        repo.check_base(digest_source(base), given=base.reference.name)
        self.reference = repo.reference
        self._repo, self._checkpoint, self._base = repo, base, repo.named(base)

    def names(self) -> list[str]:
        """Sorted tensor names."""
        return self._repo.variant_names()

    def spec(self, name: str) -> Spec:
        """Dtype and shape."""
        entry = self._repo.manifest.tensors.get(name)
        return Spec(entry.dtype, tuple(entry.shape)) if entry else self._base.spec(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, bit for bit the fine-tune's."""
        base = self._repo.base_tensor(self._checkpoint, name)
        if name not in self._repo.manifest.tensors:
            assert base is not None
            return base
        return self._repo.restored(name, base)

    def sha256(self, name: str) -> str:
        """As the manifest records it; `compress` packs from what `restored` checks against it."""
        entry = self._repo.manifest.tensors.get(name)
        if entry:
            return entry.sha256
        own = self._base.own(name)
        assert own is not None
        return self._repo.base_tensors[own].sha256


def open_variant(reference: str | Path, base: Checkpoint) -> TensorSource:
    """A checkpoint, or a delta repo made with a lossless codec against the same base."""
    found = resolve(reference)
    if (found.folder / MANIFEST_NAME).is_file():
        return RestoredSource(DeltaRepo.open(found), base)
    if (found.folder / CONFIG_NAME).is_file() and not (found.folder / "config.json").is_file():
        raise DeltafoldError(
            "not-a-checkpoint",
            f"{found.folder} is a LoRA, not a checkpoint.",
            fix="deltafold import-lora BASE LORA -o DELTA",
        )
    return Checkpoint.open(found)
