"""Storing once what deltas of a zoo have in common, without making any of them depend on another.

A payload may be split into files in any way: the manifest lists them, and the delta's identity does
not depend on the split. So the tensors that the same deltas share, part for part, go to a file of
their own, and that file is one file on disk with a name in each of these folders (a hard link).
Every delta repo stays whole: copied, uploaded or packed in an archive, it has all its bytes; removing
one of them leaves the others as they are, and the disk frees the bytes with the last name. There is no
store, and nothing that points into one.

A folder is rewritten so that it can be read after each step, and so that a run that was cut off can be
repeated: the new files are added under names made from their content, which no manifest lists yet; the
manifest is replaced; the old files go.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from deltafold.compress.durable import sync, write_atomically
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.manifest import FORMAT, MANIFEST_NAME, FileEntry, Manifest, is_evidence
from deltafold.compress.payload import payload_key
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.safetensors_file import write_file
from deltafold.compress.verify import check_payload
from deltafold.compress.zoo_folder import discard

#: A file of its own is worth it from here on, in bytes.
MIN_BYTES: Final = 2**16
#: Largest file, and so what is held in memory while one is written.
_MAX_BYTES: Final = 2**30
#: Equal content must give equal files, whatever else the deltas' manifests use.
_METADATA: Final = {"format": FORMAT, "format_version": "1.0"}


@dataclass(frozen=True)
class Piece:
    """A payload file: the tensors that it holds, and the folders that hold it."""

    name: str
    tensors: tuple[str, ...]
    owners: tuple[Path, ...]


def share(
    repos: Mapping[Path, DeltaRepo],
    *,
    min_bytes: int = MIN_BYTES,
    dry_run: bool = False,
    progress: OnProgress = ignore,
) -> tuple[dict[str, tuple[str, ...]], int]:
    """Have deltas share what they have in common.

    Args:
        repos: the deltas, by folder; all of them on one file system.
        min_bytes: what a group of deltas has in common is left alone below this.
        dry_run: change nothing.
        progress: called after every file that is shared, and every tensor that was read back.

    Returns:
        Names of the tensors that are stored once, by the names of the deltas that share them; and the
        bytes that this saves, counted from deltas that share nothing.

    Raises:
        DeltafoldError: `checksum` where a payload is damaged; its delta is as it was.
    """
    common = _common(repos, min_bytes)
    pieces = [p for owners, names in common.items() for p in _pieces(repos, names, owners)]
    saved = sum(
        (len(piece.owners) - 1) * repos[piece.owners[0]].entry(name).bytes
        for piece in pieces
        for name in piece.tensors
    )
    if not dry_run:
        done, total = 0, sum(len(piece.tensors) for piece in pieces)
        for piece in pieces:
            _lay(piece, repos)
            done += len(piece.tensors)
            nbytes = (piece.owners[0] / piece.name).stat().st_size
            progress(Progress("share", piece.tensors[-1], done, total, nbytes))
        for folder, repo in repos.items():
            mine = [p for p in pieces if folder in p.owners]
            if mine:
                _relist(repo, mine, progress)
    told = {", ".join(f.name for f in owners): tuple(names) for owners, names in common.items()}
    return told, saved


def _common(repos: Mapping[Path, DeltaRepo], min_bytes: int) -> dict[tuple[Path, ...], list[str]]:
    """Tensors by the deltas that hold the very same parts of them."""
    owners: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for folder in sorted(repos):
        for name, entry in repos[folder].manifest.tensors.items():
            owners[name, entry.payload_sha256].append(folder)
    found: dict[tuple[Path, ...], list[str]] = defaultdict(list)
    for (name, _), folders in sorted(owners.items()):
        if len(folders) > 1:
            found[tuple(folders)].append(name)
    return {
        folders: names
        for folders, names in found.items()
        if sum(repos[folders[0]].entry(n).bytes for n in names) >= max(min_bytes, 1)
    }


def _pieces(
    repos: Mapping[Path, DeltaRepo], names: Sequence[str], owners: tuple[Path, ...]
) -> Iterator[Piece]:
    """Cut tensors into files; a file's name follows from what is in it."""
    repo, pending, nbytes = repos[owners[0]], list[str](), 0
    for name in sorted(names):
        size = repo.entry(name).bytes
        if pending and nbytes + size > _MAX_BYTES:
            yield Piece(_file_name(repo, pending), tuple(pending), owners)
            pending, nbytes = [], 0
        pending.append(name)
        nbytes += size
    if pending:
        yield Piece(_file_name(repo, pending), tuple(pending), owners)


def _file_name(repo: DeltaRepo, names: Sequence[str]) -> str:
    content = json.dumps([[n, repo.entry(n).payload_sha256] for n in names])
    return f"delta-{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"


def _lay(piece: Piece, repos: Mapping[Path, DeltaRepo]) -> None:
    """Have one file stand in the folders of all owners, its content checked."""
    first = next(
        (f for f in piece.owners if piece.name in repos[f].manifest.files), piece.owners[0]
    )
    if piece.name in repos[first].manifest.files:
        for name in piece.tensors:
            repos[first].parts(name)
    else:
        _write(piece, repos[first])
    source = first / piece.name
    for folder in piece.owners:
        place = folder / piece.name
        if place.exists() and place.samefile(source):
            continue
        draft = folder / f".{piece.name}.new"
        discard(draft)
        os.link(source, draft)
        draft.replace(place)


def _write(piece: Piece, repo: DeltaRepo) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name in piece.tensors:
        for index, (_, parts) in enumerate(repo.parts(name)):
            tensors |= {payload_key(name, index, key): part for key, part in parts.items()}
    draft = repo.folder / f".{piece.name}.new"
    write_file(draft, tensors, _METADATA)
    sync(draft)
    draft.replace(repo.folder / piece.name)


def _relist(repo: DeltaRepo, shared: Sequence[Piece], progress: OnProgress) -> None:
    """Let the manifest list the shared files, and one's own files for everything else."""
    folder, elsewhere = repo.folder, {name for piece in shared for name in piece.tensors}
    own = [n for n in repo.manifest.tensors if n not in elsewhere]
    pieces = [*shared, *_pieces({folder: repo}, own, (folder,))]
    old = {n for n in repo.manifest.files if n.endswith(".safetensors")}
    new = {piece.name for piece in pieces}
    if old == new:
        return
    for piece in pieces[len(shared) :]:
        if piece.name not in old:
            _write(piece, repo)
    sync(folder)
    manifest = _manifest(repo, new)
    before = (folder / MANIFEST_NAME).read_text("utf-8")
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest.to_json(), indent=2) + "\n")
    try:
        check_payload(DeltaRepo.open(folder), progress)
    except DeltafoldError:
        write_atomically(folder / MANIFEST_NAME, before)
        raise
    for name in old - new:
        (folder / name).unlink(missing_ok=True)


def _manifest(repo: DeltaRepo, payload: set[str]) -> Manifest:
    kept = {n: f for n, f in repo.manifest.files.items() if not n.endswith(".safetensors")}
    sizes = {name: (repo.folder / name).stat().st_size for name in payload}
    files = {**kept, **{n: FileEntry(bytes=size) for n, size in sizes.items()}}
    total = sum(f.bytes for n, f in files.items() if not is_evidence(n))
    totals = repo.manifest.totals
    manifest = repo.manifest.model_copy(
        update={
            "files": dict(sorted(files.items())),
            "totals": totals.model_copy(
                update={"delta_bytes": total, "ratio": total / max(totals.variant_bytes, 1)}
            ),
        }
    )
    assert manifest.content_digest() == repo.digest
    return manifest
