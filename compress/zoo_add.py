"""Bringing a delta into a zoo, and taking a variant out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from deltafold.compress.delta_files import copy_delta, read_manifest
from deltafold.compress.durable import sync
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.hub import Reference, resolve
from deltafold.compress.progress import OnProgress, ignore
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.verify import check_payload
from deltafold.compress.zoo_aliases import aliases_lost, read_aliases, write_aliases
from deltafold.compress.zoo_folder import (
    FAMILIES_NAME,
    check_name,
    delta_folders,
    discard,
    families_named,
    families_of,
    is_variant,
    name_lock,
    open_zoo,
    put,
    variant_folders,
    zoo_lock,
)

How: TypeAlias = Literal["copy", "link", "move"]


@dataclass(frozen=True, slots=True)
class Added:
    """What came into a zoo: name, folder, content digest and size in bytes."""

    name: str
    folder: Path
    delta_id: str
    bytes: int


def add_delta(
    zoo: str | Path,
    delta: str | Path | Reference,
    *,
    name: str | None = None,
    how: How = "copy",
    overwrite: bool = False,
    progress: OnProgress = ignore,
) -> Added:
    """Put a delta into a zoo. It is verified first, and stands there whole or not at all.

    Args:
        zoo: folder; made if there is none.
        delta: folder or hub id.
        name: the variant's name; the folder's or repo's if None.
        how: `copy`; `move`, after which the folder is gone; or `link`, a symbolic link to it.
        overwrite: replace the variant of that name.
        progress: called after every tensor that was checked.

    Raises:
        DeltafoldError: `exists`; `base-mismatch` where the zoo's deltas are of another base; `busy`;
            or whatever is wrong with the delta.
    """
    reference = delta if isinstance(delta, Reference) else resolve(delta)
    chosen = name or reference.name.rpartition("/")[2]
    check_name(chosen)
    if how == "move" and reference.revision is not None:
        raise DeltafoldError(
            "bad-argument", f"{reference.name} lies in the hub's cache.", fix="leave --move out"
        )
    repo = DeltaRepo.open(reference)
    check_payload(repo, progress)
    folder = open_zoo(zoo, create=True)
    place = folder / chosen
    with zoo_lock(folder), name_lock(folder, chosen):
        _check_free(folder, chosen, overwrite)
        _check_base(folder, repo, but=chosen)
        if place.exists() and place.resolve() == repo.folder.resolve():
            raise DeltafoldError("bad-argument", f"{place} is the delta that is to be added.")
        draft = folder / f".{chosen}.new"
        discard(draft)
        try:
            _bring_families(repo.folder, folder)
            _stage(repo, draft, how, progress)
            put(draft, place)
        finally:
            if draft.exists() and not repo.folder.exists():
                draft.rename(repo.folder)
            discard(draft)
        if how == "move" and repo.folder.exists():
            shutil.rmtree(repo.folder)
    return Added(chosen, place, repo.digest, repo.manifest.totals.delta_bytes)


@dataclass(frozen=True, slots=True)
class Removed:
    """What left a zoo: the variant's name, and the aliases that went with it."""

    name: str
    aliases: tuple[str, ...]


def remove_variant(zoo: str | Path, name: str, *, force: bool = False) -> Removed:
    """Take a variant out of a zoo. A delta that was linked stays where it really is.

    Raises:
        DeltafoldError: `variant-not-found`; `busy` where aliases stand for it and `force` is not
            given; with it they are forgotten.
    """
    folder = open_zoo(zoo)
    with zoo_lock(folder):
        names = [f.name for f in variant_folders(folder)]
        if name not in names:
            raise DeltafoldError(
                "variant-not-found",
                f"the zoo {folder} has no variant called {name!r}.",
                facts=[("variants", name_some(names) or "none")],
            )
        lost = aliases_lost(folder, name)
        if lost and not force:
            raise _alias_in_the_way(folder, name, lost, "--force removes the alias too")
        if lost:
            kept = {a: d for a, d in read_aliases(folder).items() if a not in lost}
            write_aliases(folder, kept)
        # Gone under its name at once; the bytes may take a while.
        with name_lock(folder, name):
            gone = folder / f".{name}.removed"
            discard(gone)
            (folder / name).rename(gone)
            sync(folder)
            discard(gone)
    return Removed(name, tuple(lost))


def _check_free(zoo: Path, name: str, overwrite: bool) -> None:
    if name in read_aliases(zoo):
        raise DeltafoldError(
            "exists",
            f"{name} is an alias in the zoo {zoo}.",
            fix=f"choose another --name, or: deltafold zoo alias {zoo} {name} --rm",
        )
    place = zoo / name
    if not place.exists():
        return
    if not overwrite:
        raise DeltafoldError(
            "exists", f"{place} exists.", fix="choose another --name, or --overwrite"
        )
    if not is_variant(place):
        raise DeltafoldError(
            "exists",
            f"{place} exists and is no variant: it is not replaced.",
            fix="choose another --name, or remove it yourself",
        )
    lost = aliases_lost(zoo, name)
    if lost:
        raise _alias_in_the_way(
            zoo, name, lost, "add the new one under another name, and set the alias to that"
        )


def _alias_in_the_way(zoo: Path, name: str, lost: list[str], fix: str) -> DeltafoldError:
    return DeltafoldError(
        "busy",
        f"{name} of the zoo {zoo} is what an alias stands for.",
        facts=[("aliases", ", ".join(lost))],
        fix=fix,
    )


def _check_base(zoo: Path, repo: DeltaRepo, *, but: str) -> None:
    """A zoo is served from one base, so its deltas have one."""
    base = repo.manifest.base
    for folder in delta_folders(zoo):
        if folder.name == but:
            continue
        try:
            other = read_manifest(folder).base
        except DeltafoldError:
            continue
        if other.fingerprint != base.fingerprint:
            raise DeltafoldError(
                "base-mismatch",
                f"{repo.folder} is a delta against another base than those of the zoo {zoo}.",
                facts=[
                    ("this delta", f"{base.name}  ({base.fingerprint[:23]}...)"),
                    (folder.name, f"{other.name}  ({other.fingerprint[:23]}...)"),
                ],
                fix="put it into a zoo of its own: one server has one base",
            )


def _stage(repo: DeltaRepo, draft: Path, how: How, progress: OnProgress) -> None:
    if how == "link":
        draft.symlink_to(repo.folder.resolve(), target_is_directory=True)
        return
    if how == "move" and repo.folder.stat().st_dev == draft.parent.stat().st_dev:
        repo.folder.rename(draft)
        return
    draft.mkdir()
    copy_delta(repo.folder, draft)
    for path in draft.rglob("*"):
        sync(path)
    check_payload(DeltaRepo.open(draft), progress)


def _bring_families(delta: Path, zoo: Path) -> None:
    """What the delta shares with others comes along, from beside it or from within it."""
    candidates = [*families_of(delta), *families_of(delta.resolve().parent)]
    for family in families_named(delta, candidates):
        place = zoo / FAMILIES_NAME / family.name
        if place.exists():
            continue
        draft = place.with_name(f".{family.name}.new")
        discard(draft)
        shutil.copytree(family, draft)
        put(draft, place)
