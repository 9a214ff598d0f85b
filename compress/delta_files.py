"""Which files of a folder make up a delta repo, and copying them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.manifest import MANIFEST_NAME, Manifest, parse_manifest

_CARD: Final = "README.md"
#: Kinds of evidence; what else somebody keeps in `report/` stays where it is.
_EVIDENCE: Final = (".csv", ".html", ".json", ".svg")


def read_manifest(folder: Path) -> Manifest:
    """A delta repo's manifest alone, nothing else of it being checked.

    Raises:
        DeltafoldError: `not-a-delta`, or as `parse_manifest`.
    """
    path = folder / MANIFEST_NAME
    try:
        return parse_manifest(path.read_text("utf-8", errors="replace"), str(path))
    except OSError as error:
        raise DeltafoldError(
            "not-a-delta",
            f"{folder} is not a delta repo: it has no {MANIFEST_NAME}.",
            fix="make one with: deltafold compress BASE VARIANT -o DELTA",
        ) from error


def delta_files(folder: Path) -> list[str]:
    """Names within the folder: the manifest, what it lists, and the evidence; sorted.

    Whatever else lies there (`*.partial`, a cache, notes) is no part of the delta.
    """
    names = {MANIFEST_NAME, *read_manifest(folder).files}
    if (folder / _CARD).is_file():
        names.add(_CARD)
    for path in (folder / "report").rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.suffix in _EVIDENCE and "/." not in name:
            names.add(name)
    return sorted(name for name in names if (folder / name).is_file())


def copy_delta(folder: Path, out: Path) -> None:
    """Copy a delta's files to a new folder; links become files."""
    for name in delta_files(folder):
        place = out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, place)
