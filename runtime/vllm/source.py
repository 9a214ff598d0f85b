"""Opening what a LoRA request's path names: a delta repo, or a PEFT LoRA folder, for this base."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.adapter import CONFIG_NAME
from deltafold.compress.fingerprint import Digests, digest_source
from deltafold.compress.lora import cached_lora
from deltafold.compress.manifest import MANIFEST_NAME
from deltafold.compress.verify import check_coverage
from deltafold.runtime.zoo import Zoo

#: The names that stand for the base anywhere.
_BASE = "base"
_MARK = "#sha256:"


def tagged(folder: str | Path, digest: str) -> str:
    """A path that names the content too. vLLM's prefix cache knows a variant by name and path alone,
    so a delta that is replaced in place would otherwise be given the old one's keys and values.
    """
    assert digest.startswith("sha256:")
    return f"{folder}#{digest}"


def untagged(path: str) -> tuple[str, str | None]:
    """The folder and the digest, if it has one, of a path."""
    folder, mark, digest = path.partition(_MARK)
    return folder, f"sha256:{digest}" if mark else None


@dataclass
class Source:
    """The base that is served, and the deltas that fit it. Thread-safe.

    Attributes:
        base: its checkpoint.
    """

    base: Checkpoint

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @cached_property
    def _digests(self) -> Digests:
        return digest_source(self.base)

    def digests(self) -> Digests:
        """The base's digests; hashed once, and cached on disk."""
        with self._lock:
            return self._digests

    def open(self, path: str) -> DeltaRepo:
        """A delta repo that is whole and fits the base.

        Raises:
            DeltafoldError: `not-found`, `not-a-delta`, `base-mismatch`, `checksum`, `coverage`, and
                what else is wrong with it.
        """
        folder, digest = untagged(path)
        place = Path(folder).expanduser()
        digests = self.digests()
        if not (place / MANIFEST_NAME).is_file() and (place / CONFIG_NAME).is_file():
            place = cached_lora(self.base, place)
        repo = DeltaRepo.open(place if place.is_dir() else folder)
        repo.check_base(digests, given=self.base.reference.name)
        check_coverage(repo, digests)
        repo.check_quantization(None)
        if digest is not None and repo.digest != digest:
            raise DeltafoldError(
                "checksum",
                f"{folder} was replaced since its variant was loaded.",
                facts=[("expected", digest[:23]), ("found", repo.digest[:23])],
                fix="unload the variant and load it again",
            )
        return repo

    def zoo(self, folder: Path | None, names: Iterable[str] = ()) -> Zoo:
        """A zoo of deltas and LoRAs for the base.

        Args:
            folder: of the zoo; None is an empty one.
            names: that stand for the base.

        Raises:
            DeltafoldError: `not-found`, `bad-argument`.
        """
        return Zoo(
            folder,
            self.digests(),
            self.base.reference.name,
            reserved={_BASE, *names},
            import_lora=lambda lora: cached_lora(self.base, lora),
        )
