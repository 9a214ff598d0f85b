"""A zoo on disk: a folder of delta repos and LoRAs, what stands in it, and how it is changed.

Whatever changes a zoo holds its lock, and makes new things under a hidden name before a rename shows
them: a server that reads the zoo meanwhile sees the old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from deltafold.compress.adapter import CONFIG_NAME
from deltafold.compress.durable import sync
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.manifest import MANIFEST_NAME

FAMILIES_NAME: Final = ".families"
_LOCK: Final = ".zoo.lock"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def open_zoo(zoo: str | Path, *, create: bool = False) -> Path:
    """The zoo's folder.

    Raises:
        DeltafoldError: `not-found` where there is none (and none is to be made); `bad-argument`
            where it is itself a delta.
    """
    folder = Path(zoo).expanduser()
    if create:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise DeltafoldError(
            "not-found", f"the zoo {folder} is not a folder.", fix="give a folder of deltas"
        )
    if is_delta(folder):
        raise DeltafoldError(
            "bad-argument",
            f"the zoo {folder} is itself a delta.",
            fix=f"give the folder that holds it: {folder.resolve().parent}",
        )
    return folder


def is_delta(folder: Path) -> bool:
    """Whether a folder says that it is a delta repo."""
    return (folder / MANIFEST_NAME).is_file()


def is_variant(folder: Path) -> bool:
    """Whether a server takes the folder for a variant: a delta repo, or a PEFT LoRA."""
    return is_delta(folder) or (folder / CONFIG_NAME).is_file()


def variant_folders(zoo: Path) -> list[Path]:
    """What a server would serve of a zoo, broken deltas too, by name."""
    return sorted(
        path
        for path in zoo.iterdir()
        if not path.name.startswith(".") and not path.name.endswith(".partial") and is_variant(path)
    )


def delta_folders(zoo: Path) -> list[Path]:
    """The delta repos of a zoo, by name."""
    return [path for path in variant_folders(zoo) if is_delta(path)]


def check_name(name: str) -> None:
    """Raises `bad-argument` for what cannot be the name of a variant or an alias."""
    hidden = name.startswith(".") or name.endswith(".partial")
    if not name or hidden or name == "base" or any(c in name for c in "/\\\0\n"):
        raise DeltafoldError(
            "bad-argument",
            f"{name!r} cannot be the name of a variant.",
            fix="take one without / that does not begin with a dot, end in .partial, or say 'base'",
        )


@contextlib.contextmanager
def zoo_lock(zoo: Path) -> Iterator[None]:
    """Keep every other change of the zoo away; `busy` where one is under way."""
    try:
        lock = os.open(zoo / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise DeltafoldError(
            "bad-argument", f"the zoo {zoo} cannot be written: {error.strerror}."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise DeltafoldError(
            "busy", f"another run is changing the zoo {zoo}.", fix="wait for it"
        ) from error
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DeltafoldError(
                "not-enough-disk",
                f"the disk is full; the zoo {zoo} is as it was.",
                fix="free some space",
            ) from error
        raise
    finally:
        os.close(lock)


def take_name(zoo: Path, name: str) -> int | None:
    """The lock that a run which writes `zoo/NAME` holds (see `staging`); None where one does."""
    path = zoo / f".{name}.lock"
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        # The holder before may have removed the file between our opening and our locking it.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)


def give_name(zoo: Path, name: str, lock: int) -> None:
    """Undo `take_name`."""
    (zoo / f".{name}.lock").unlink(missing_ok=True)
    os.close(lock)


@contextlib.contextmanager
def name_lock(zoo: Path, name: str) -> Iterator[None]:
    """Keep away whoever writes `zoo/NAME`; `busy` where somebody does already."""
    lock = take_name(zoo, name)
    if lock is None:
        raise DeltafoldError("busy", f"another run is writing {zoo / name}.", fix="wait for it")
    try:
        yield
    finally:
        give_name(zoo, name, lock)


def put(new: Path, place: Path) -> None:
    """Rename a folder or link to its place; what stood there goes."""
    old = place.with_name(f".{place.name}.old")
    discard(old)
    if os.path.lexists(place):
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if os.path.lexists(old):
            old.rename(place)
        raise
    sync(place.parent)
    discard(old)


def discard(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def disk_bytes(paths: Iterable[Path]) -> int:
    """Bytes of all files beneath; a file with several names counts once, links are not followed."""
    seen: dict[tuple[int, int], int] = {}
    for path in paths:
        for file in [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else [])]:
            stat = file.lstat()
            if file.is_file() and not file.is_symlink():
                seen[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(seen.values())


def families_of(zoo: Path) -> list[Path]:
    """Folders of what deltas of the zoo share by digest; each is named after the digest."""
    folder = zoo / FAMILIES_NAME
    if not folder.is_dir():
        return []
    return sorted(
        p
        for p in folder.iterdir()
        if p.is_dir() and not p.name.startswith(".") and "." not in p.name
    )


def families_named(delta: Path, candidates: Iterable[Path]) -> list[Path]:
    """Those of some families whose digest the delta's manifest mentions anywhere."""
    text = (delta / MANIFEST_NAME).read_text("utf-8", errors="replace")
    return [family for family in candidates if family.name in text]
