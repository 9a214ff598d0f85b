"""A model's identity by content, not by name.

The fingerprint is the sha256 over one JSON line `[name, dtype, shape, sha256 of the bytes]` a tensor,
sorted by name. Digests of files that did not change since they were last hashed come from a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.naming import NamedBase
from deltafold.compress.safetensors_file import SafetensorsFile
from deltafold.compress.several import cores, finished

#: Threads that hash a checkpoint; more wait for the disk.
MOST_THREADS: Final = 8
#: A file that was written less than this ago is not cached: it may change again without its stamp
#: changing, since clocks of file systems are coarse.
_SETTLED_NS: Final = 1_000_000_000


class TensorDigest(NamedTuple):
    """Dtype name, shape and sha256 of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


Digests = Mapping[str, TensorDigest]


def fingerprint(digests: Digests) -> str:
    """`sha256:<hex>` over the sorted tensors."""
    total = hashlib.sha256()
    for name in sorted(digests):
        dtype, shape, digest = digests[name]
        line = json.dumps([name, dtype, list(shape), digest], separators=(",", ":"))
        total.update(line.encode() + b"\n")
    return f"sha256:{total.hexdigest()}"


def digest_source(
    source: TensorSource, progress: Callable[[str, int], None] | None = None
) -> dict[str, TensorDigest]:
    """Hash every tensor of a source, several at a time; `progress(name, bytes)` after each."""
    if isinstance(source, NamedBase):
        return source.named(digest_source(source.checkpoint, progress))
    if isinstance(source, Checkpoint):
        digests: dict[str, TensorDigest] = {}
        for file in source.files:
            digests |= _digest_file(file, progress)
        return digests
    return {name: TensorDigest(*source.spec(name), source.sha256(name)) for name in source.names()}


def first_differences(expected: Digests, found: Digests) -> list[str]:
    """Names whose digest, dtype or shape differ, or that only one side has, sorted."""
    return [n for n in sorted({*expected, *found}) if expected.get(n) != found.get(n)]


def cache_folder() -> Path:
    """`$DELTAFOLD_HOME`, or the user's cache folder."""
    home = os.environ.get("DELTAFOLD_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deltafold"


class DigestCache:
    """What is known of a checkpoint's digests, as of the moment when this was made.

    Attributes:
        folder: the checkpoint.
        stamps: by file name what tells that a file was changed.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.folder = source.folder
        # Taken before hashing: what changes meanwhile must not be found under its new stamp.
        self.stamps = source.stamps()
        self._places = [(file, _cache_path(file)) for file in source.files]

    def now(self) -> dict[str, tuple[int, int, int, int]]:
        """The stamps of the same files now. Raises `not-found` where one is gone."""
        return {file.path.name: file.stamp() for file, _ in self._places}

    def known(self) -> dict[str, str]:
        """Digests by tensor name that need no hashing."""
        found: dict[str, str] = {}
        for file, place in self._places:
            found |= _read_cache(file, place) or {}
        return found

    def remember(self, digests: Digests) -> None:
        """Keep the digests of all tensors for the next time."""
        for file, place in self._places:
            if place is not None and not place.is_file():
                _write_cache(place, {name: digests[name].sha256 for name in file.entries})


def _digest_file(
    file: SafetensorsFile, progress: Callable[[str, int], None] | None
) -> dict[str, TensorDigest]:
    # The key is taken before hashing: what changes meanwhile must not be found under its new stamp.
    place = _cache_path(file)
    cached = _read_cache(file, place)
    known: dict[str, str] = dict(cached or {})

    def hash_one(name: str) -> None:
        known[name] = file.sha256(name)

    # The largest first, so that none is left to run alone at the end.
    left = sorted(file.entries.keys() - known.keys(), key=lambda n: (-file.nbytes(n), n))
    for name in finished(hash_one, left, cores(MOST_THREADS) if len(left) > 1 else 1):
        if progress is not None:
            progress(name, file.nbytes(name))
    digests = {n: TensorDigest(e.dtype, e.shape, known[n]) for n, e in file.entries.items()}
    if cached is None and place is not None:
        _write_cache(place, {name: d.sha256 for name, d in digests.items()})
    return digests


def _cache_path(file: SafetensorsFile) -> Path | None:
    stat = file.path.stat()
    if time.time_ns() - stat.st_ctime_ns < _SETTLED_NS:
        return None
    # ctime as well: a tool may set mtime back, but not ctime.
    key = (
        f"{file.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
    )
    return cache_folder() / "digests" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _read_cache(file: SafetensorsFile, path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and set(data) == set(file.entries) else None


def _write_cache(path: Path, digests: dict[str, str]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(digests), "utf-8")
        partial.replace(path)
    except OSError:
        # A cache that cannot be written (read-only home, full disk) costs time, nothing else.
        with contextlib.suppress(OSError):
            partial.unlink()
