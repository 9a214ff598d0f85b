"""Clearing a zoo of what nobody needs, and storing once what its deltas have in common."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from deltafold.compress.delta_files import read_manifest
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.journal import is_journal, is_resumable
from deltafold.compress.manifest import MANIFEST_NAME
from deltafold.compress.progress import OnProgress, ignore
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.zoo_folder import (
    FAMILIES_NAME,
    delta_folders,
    discard,
    disk_bytes,
    families_named,
    families_of,
    give_name,
    is_variant,
    open_zoo,
    take_name,
    zoo_lock,
)
from deltafold.compress.zoo_share import MIN_BYTES, share

#: What a payload file may be called; others are not ours to remove.
_PAYLOAD: Final = re.compile(
    r"delta(-[0-9a-f]{32}|-\d{5}-of-\d{5})?\.safetensors|\.delta-\d+|\..+\.new"
)
_HIDDEN: Final = re.compile(r"\.(.+)\.(new|old|removed|lock)")


class Leftover(NamedTuple):
    """Something that a run which was cut off has left behind, and how large it is."""

    path: Path
    why: str
    bytes: int


@dataclass(frozen=True)
class Collected:
    """What was done, or with `dry_run` would be.

    Attributes:
        leftovers: removed.
        recovered: variants that a replacement had moved away when it was cut off; they stand under
            their names again.
        shared: tensors that are stored once, by the names of the deltas that share them.
        skipped: deltas that nothing was shared with, and why.
        unfinished: `NAME.partial` of runs that the same command would finish; they were kept.
        before: bytes on disk; a file with several names counts once.
        after: bytes on disk afterwards; with `dry_run` what they would be, more or less.
    """

    leftovers: tuple[Leftover, ...]
    recovered: tuple[str, ...]
    shared: Mapping[str, tuple[str, ...]]
    skipped: Mapping[str, str]
    before: int
    after: int
    dry_run: bool = False
    unfinished: tuple[Path, ...] = ()

    @property
    def freed(self) -> int:
        """Bytes."""
        return self.before - self.after


def collect(
    zoo: str | Path,
    *,
    dry_run: bool = False,
    unfinished: bool = False,
    min_bytes: int = MIN_BYTES,
    progress: OnProgress = ignore,
) -> Collected:
    """Remove leftovers, and store tensors that are equal between deltas once.

    Nothing that a delta needs is touched before it stands elsewhere: a run that is cut off at any
    point leaves every delta readable, and the next one finishes the work.

    Args:
        zoo: the zoo's folder.
        dry_run: say what would be done, and change nothing.
        unfinished: remove what runs that were cut short have finished so far, too.
        min_bytes: least bytes that a group of deltas must have in common to share them.
        progress: called after every file that is shared, and every tensor that was read back.

    Raises:
        DeltafoldError: `busy` where another run changes the zoo; `not-enough-disk`.
    """
    folder = open_zoo(zoo)
    with zoo_lock(folder), contextlib.ExitStack() as locks:
        before = disk_bytes([folder])
        recovered = _recover(folder, dry_run)
        held = _hold(folder, locks)
        waiting, partial = _partial(folder, held, locks)
        kept = () if unfinished else tuple(waiting)
        leftovers = (
            *(_leftover(path, "a run that was cut off") for path in partial if path not in kept),
            *_leftovers(folder, held),
        )
        if not dry_run:
            for leftover in leftovers:
                discard(leftover.path)
        chosen = _sharers(folder, held)
        shared, saved = share(chosen.repos, min_bytes=min_bytes, dry_run=dry_run, progress=progress)
        if dry_run:
            after = before - sum(x.bytes for x in leftovers) - max(saved - chosen.linked(), 0)
        else:
            after = disk_bytes([folder])
    return Collected(leftovers, recovered, shared, chosen.skipped, before, after, dry_run, kept)


def _hold(zoo: Path, locks: contextlib.ExitStack) -> set[str]:
    """The deltas that nobody writes, each kept from being replaced until `locks` are given back."""
    held = set()
    for folder in delta_folders(zoo):
        lock = take_name(zoo, folder.name)
        if lock is not None:
            locks.callback(give_name, zoo, folder.name, lock)
            held.add(folder.name)
    return held


@dataclass
class _Sharers:
    """The deltas that may share files, and why the others may not."""

    repos: dict[Path, DeltaRepo] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def linked(self) -> int:
        """Bytes that the deltas share already."""
        files = [f / n for f, repo in self.repos.items() for n in repo.manifest.files]
        return sum(path.stat().st_size for path in files) - disk_bytes(files)


def _sharers(zoo: Path, held: set[str]) -> _Sharers:
    found = _Sharers()
    for folder in delta_folders(zoo):
        if folder.name not in held:
            found.skipped[folder.name] = "another run is replacing it"
            continue
        if folder.is_symlink():
            found.skipped[folder.name] = "it is a link to another place"
            continue
        if not _can_link(zoo, folder):
            found.skipped[folder.name] = "its file system does not let files have two names"
            continue
        try:
            found.repos[folder] = DeltaRepo.open(folder)
        except DeltafoldError as error:
            found.skipped[folder.name] = f"error[{error.code}]: {error.message}"
    return found


def _can_link(zoo: Path, folder: Path) -> bool:
    probe = zoo / ".zoo.link"
    discard(probe)
    try:
        os.link(folder / MANIFEST_NAME, probe)
    except OSError:
        return False
    discard(probe)
    return True


def _recover(zoo: Path, dry_run: bool) -> tuple[str, ...]:
    """Put back what was moved away to be replaced, where nothing has taken its place."""
    names = []
    for path in sorted(zoo.glob(".*.old")):
        name = path.name[1:].removesuffix(".old")
        lock = take_name(zoo, name)
        if lock is None:
            continue
        if not (zoo / name).exists() and is_variant(path):
            names.append(name)
            if not dry_run:
                path.rename(zoo / name)
        give_name(zoo, name, lock)
    return tuple(names)


def _partial(
    zoo: Path, held: set[str], locks: contextlib.ExitStack
) -> tuple[list[Path], list[Path]]:
    """What runs that were cut off have left: those that can go on, and all; none begins meanwhile."""
    waiting, found = [], []
    for path in sorted(p for p in zoo.glob("*.partial") if p.is_dir()):
        name = path.name.removesuffix(".partial")
        if name not in held:
            lock = take_name(zoo, name)
            if lock is None:
                continue
            locks.callback(give_name, zoo, name, lock)
        found.append(path)
        if is_resumable(path):
            waiting.append(path)
    return waiting, found


def _leftovers(zoo: Path, held: set[str]) -> Iterator[Leftover]:
    for path in sorted(zoo.iterdir()):
        name, match = path.name, _HIDDEN.fullmatch(path.name)
        if match and name != ".zoo.lock" and not _in_work(zoo, match[1], held):
            # Asking for a lock that nobody holds has removed its file; an old delta that has not been
            # replaced is not a leftover.
            lone = match[2] == "old" and not (zoo / match[1]).exists()
            if match[2] != "lock" and not lone:
                yield _leftover(path, "a change that was cut off")
    for folder in delta_folders(zoo):
        if folder.name in held and not folder.is_symlink():
            yield from _unlisted(folder)
    yield from _orphaned_families(zoo)


def _unlisted(folder: Path) -> Iterator[Leftover]:
    """Payload files of a delta that its manifest does not list."""
    try:
        listed = set(read_manifest(folder).files)
    except DeltafoldError:
        return
    for path in sorted(folder.iterdir()):
        if is_journal(path):
            yield _leftover(path, "the journal of a run that was cut off at its end")
        if _PAYLOAD.fullmatch(path.name) and path.name not in listed:
            yield _leftover(path, "a payload file that its manifest does not list")


def _orphaned_families(zoo: Path) -> Iterator[Leftover]:
    """What no manifest of the zoo refers to, where all can be read and nothing is being written."""
    deltas, families = delta_folders(zoo), families_of(zoo)
    if any(zoo.glob("*.partial")) or not all(map(_is_readable, deltas)):
        return
    used = {family for delta in deltas for family in families_named(delta, families)}
    for family in families:
        if family not in used and not _in_work(zoo / FAMILIES_NAME, family.name, set()):
            yield _leftover(family, "shared by deltas that are gone")


def _is_readable(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder).delta_id)
    except DeltafoldError:
        return False


def _leftover(path: Path, why: str) -> Leftover:
    return Leftover(path, why, disk_bytes([path]))


def _in_work(folder: Path, name: str, held: set[str]) -> bool:
    """Whether another run holds the lock of what it writes under this name."""
    if name in held or not (folder / f".{name}.lock").exists():
        return False
    lock = take_name(folder, name)
    if lock is not None:
        give_name(folder, name, lock)
    return lock is None
