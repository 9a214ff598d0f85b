"""What is in a zoo, and whether it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deltafold.compress.adapter import Adapter
from deltafold.compress.delta_files import read_manifest
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.progress import OnProgress, ignore
from deltafold.compress.verify import verify_delta
from deltafold.compress.zoo_aliases import read_aliases
from deltafold.compress.zoo_folder import (
    disk_bytes,
    families_of,
    is_delta,
    open_zoo,
    variant_folders,
)


@dataclass(frozen=True)
class Member:
    """A variant of a zoo, as its manifest (or LoRA configuration) describes it.

    Attributes:
        name: its folder's.
        kind: `delta` or `lora`.
        delta_id: content digest; empty for a LoRA.
        codec: the default codec.
        base: the base's name.
        fingerprint: the base's identity; empty for a LoRA.
        bytes: size of all its files, were they alone.
        ratio: size over the fine-tune's; None for a LoRA.
        aliases: names that stand for it besides its own.
        linked: the place that it really lies in, where it is a link.
        error: what is wrong, if its description cannot be read.
    """

    name: str
    kind: str
    delta_id: str = ""
    codec: str = ""
    base: str = ""
    fingerprint: str = ""
    bytes: int = 0
    ratio: float | None = None
    aliases: tuple[str, ...] = ()
    linked: str = ""
    error: DeltafoldError | None = None


@dataclass(frozen=True)
class Listing:
    """A zoo.

    Attributes:
        folder: its place.
        members: by name.
        dangling: aliases whose digest no delta has.
        families_bytes: of what deltas share by digest.
        disk_bytes: of everything, a file with several names counted once.
    """

    folder: Path
    members: tuple[Member, ...]
    dangling: dict[str, str]
    families_bytes: int
    disk_bytes: int


def list_zoo(zoo: str | Path) -> Listing:
    """Describe a zoo. Payloads are not read; `verify_zoo` does that.

    Raises:
        DeltafoldError: `not-found`, or `bad-manifest` where the file of aliases is broken.
    """
    folder = open_zoo(zoo)
    aliases = read_aliases(folder)
    members = tuple(_member(path, aliases) for path in variant_folders(folder))
    known = {m.delta_id for m in members}
    dangling = {a: d for a, d in aliases.items() if d not in known}
    shared = disk_bytes(families_of(folder))
    return Listing(folder, members, dangling, shared, disk_bytes([folder]))


def _member(folder: Path, aliases: dict[str, str]) -> Member:
    linked = str(folder.resolve()) if folder.is_symlink() else ""
    try:
        if not is_delta(folder):
            adapter = Adapter.open(folder)
            return Member(
                folder.name,
                "lora",
                codec="dora" if adapter.config.get("use_dora") else "lora",
                base=str(adapter.config.get("base_model_name_or_path") or ""),
                bytes=adapter.file.path.stat().st_size,
                linked=linked,
            )
        manifest = read_manifest(folder)
    except DeltafoldError as error:
        kind = "delta" if is_delta(folder) else "lora"
        return Member(folder.name, kind, linked=linked, error=error)
    return Member(
        folder.name,
        "delta",
        manifest.delta_id,
        manifest.codec_summary(),
        manifest.base.name,
        manifest.base.fingerprint,
        manifest.totals.delta_bytes,
        manifest.totals.ratio,
        tuple(alias for alias, digest in aliases.items() if digest == manifest.delta_id),
        linked,
    )


@dataclass(frozen=True)
class Checked:
    """The outcome for one variant or alias: its error, or None where all is well."""

    name: str
    kind: str
    error: DeltafoldError | None = None


def verify_zoo(
    zoo: str | Path,
    *,
    base: str | Path | None = None,
    full: bool = False,
    progress: OnProgress = ignore,
) -> Iterator[Checked]:
    """Check every variant and alias of a zoo, one after another; nothing is raised for what fails.

    Args:
        zoo: the zoo's folder.
        base: also check that this is the base of all deltas, and that no tensor is missing.
        full: also rebuild what is stored exactly; needs `base`.
        progress: called after every tensor.

    Raises:
        DeltafoldError: `bad-argument` where `full` comes without `base`, or the zoo is none.
    """
    folder = open_zoo(zoo)
    if full and base is None:
        raise DeltafoldError("bad-argument", "a full check needs the base.", fix="--base BASE")
    for path in variant_folders(folder):
        try:
            if is_delta(path):
                verify_delta(path, base=base, full=full, progress=progress)
            else:
                Adapter.open(path)
            yield Checked(path.name, "delta" if is_delta(path) else "lora")
        except DeltafoldError as error:
            yield Checked(path.name, "delta" if is_delta(path) else "lora", error)
    for alias, digest in list_zoo(folder).dangling.items():
        yield Checked(alias, "alias", no_delta_behind(alias, digest))


def no_delta_behind(alias: str, digest: str) -> DeltafoldError:
    """The error for an alias whose delta is not there."""
    return DeltafoldError(
        "variant-not-found",
        f"the alias {alias!r} stands for a delta that is not in the zoo.",
        facts=[("delta", digest)],
        fix=f"bring it back, or: deltafold zoo alias ZOO {alias} NAME",
    )
