"""A folder that appears under its name only when it is whole.

Work goes to `NAME.partial/`, under a lock; `publish` syncs every file and renames. Whatever happens
before that, nothing exists under the output's name, and a failed run leaves nothing behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from deltafold.compress.errors import DeltafoldError


class Staging:
    """Context manager around a folder that is being made.

    Args:
        out: the final folder; must not exist unless `overwrite`.
        overwrite: replace an existing folder, at the moment of publishing.

    Raises:
        DeltafoldError: `exists`; `busy` where another run works on the same folder.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self._lock_path = out.with_name(f".{out.name}.lock")
        self._overwrite = overwrite
        self._lock = -1
        self._published = False
        if out.exists() and not overwrite:
            raise DeltafoldError(
                "exists", f"{out} exists.", fix="choose another -o, or --overwrite"
            )

    def __enter__(self) -> Self:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._lock_path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = -1
            raise DeltafoldError(
                "busy",
                f"another run is writing {self.out}.",
                fix="wait for it, or choose another -o",
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self

    def publish(self) -> None:
        """Sync and rename; afterwards the folder stands under its own name."""
        for path in [*self.folder.rglob("*"), self.folder]:
            _sync(path)
        if self._overwrite and self.out.exists():
            old = self.out.with_name(f".{self.out.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
            self.folder.rename(self.out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.folder.rename(self.out)
        _sync(self.out.parent)
        self._published = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._published:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DeltafoldError(
                "not-enough-disk",
                f"the disk is full; nothing was written to {self.out}.",
                fix="free some space, or choose another -o",
            ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
