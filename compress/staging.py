"""A folder that appears under its name only when it is whole.

Work goes to `NAME.partial/`, under a lock; `publish` syncs every file and renames. Whatever happens
before that, nothing exists under the output's name. A failed run leaves nothing behind, unless it can
go on where it stopped: then `NAME.partial/` stays.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Self

from deltafold.compress.durable import sync
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.journal import discard, is_journal

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Staging:
    """Context manager around a folder that is being made.

    Args:
        out: the final folder; must not exist unless `overwrite`.
        overwrite: replace an existing delta or checkpoint, at the moment of publishing.
        inputs: folders that the run reads, which `out` must not replace.
        resume: begin with what an earlier run left in `NAME.partial/`.

    Attributes:
        keep: leave `NAME.partial/` behind when the run is cut short from outside (interrupted, no
            room, an input that vanished); set it once there is something worth keeping.

    Raises:
        DeltafoldError: `exists`; `busy` where another run works on the same folder; `bad-argument`
            where `out` cannot be written, or is an input.
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        inputs: Collection[Path] = (),
        resume: bool = False,
    ) -> None:
        self._given = out
        self._overwrite, self._resume = overwrite, resume
        self.keep = False
        self._lock = -1
        self._published = False
        self.out = out = out.resolve()
        self._refuse_inputs(inputs)
        self._refuse_inside_a_delta()
        self._refuse_existing()
        self.folder = out.with_name(out.name + ".partial")
        self._lock_path = out.with_name(f".{out.name}.lock")
        self._old = out.with_name(f".{out.name}.old")

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._recover()
            # The run that held the lock may have finished since.
            self._refuse_existing()
            if not self._resume:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            self._release()
            if error.errno in _FULL:
                raise self._disk_full() from error
            raise DeltafoldError(
                "bad-argument",
                f"{self._given} cannot be written: {error.strerror}.",
                fix="choose another -o",
            ) from error
        except DeltafoldError:
            self._release()
            raise
        return self

    def publish(self) -> None:
        """Sync and rename; afterwards the folder stands under its own name, its journal gone."""
        for path in [*self.folder.rglob("*"), self.folder]:
            if not is_journal(path):
                sync(path)
        if self._overwrite and self.out.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            self.out.rename(self._old)
        self.folder.rename(self.out)
        sync(self.out.parent)
        self._published = True
        # Not before: a run that is killed until then finds there what is finished.
        discard(self.out)
        shutil.rmtree(self._old, ignore_errors=True)

    def _recover(self) -> None:
        """Put back what a run was about to replace when it was killed; remove what was replaced."""
        if self.out.exists():
            shutil.rmtree(self._old, ignore_errors=True)
        elif self._old.exists():
            self._old.rename(self.out)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = self.keep and _from_outside(error)
        if not (self._published or kept):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()
        if isinstance(error, KeyboardInterrupt) and kept:
            error.add_note("what is done is kept: the same command goes on where it stopped")
        if isinstance(error, OSError) and error.errno in _FULL:
            raise self._disk_full(kept) from error
        if isinstance(error, DeltafoldError) and kept:
            raise DeltafoldError(
                error.code,
                error.message,
                facts=[*error.facts, ("kept", f"what is done, in {self.folder.name}")],
                fix=f"{error.fix}; then run the same command again: it goes on where it stopped",
            ) from error

    def _take_lock(self) -> int:
        while True:
            lock = os.open(self._lock_path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise DeltafoldError(
                    "busy",
                    f"another run is writing {self._given}.",
                    fix="wait for it, or choose another -o",
                ) from error
            # The run before may have removed the file between our opening and our locking it.
            if _same_file(lock, self._lock_path):
                return lock
            os.close(lock)

    def _release(self) -> None:
        if self._lock >= 0:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def _refuse_inputs(self, inputs: Collection[Path]) -> None:
        for folder in inputs:
            if folder.resolve().is_relative_to(self.out):
                raise DeltafoldError(
                    "bad-argument",
                    f"-o {self._given} is where this run reads {folder} from.",
                    fix="choose another -o",
                )

    def _refuse_inside_a_delta(self) -> None:
        for folder in self.out.parents:
            if (folder / "delta_config.json").is_file():
                raise DeltafoldError(
                    "bad-argument",
                    f"-o {self._given} lies inside the delta {folder}.",
                    fix=f"a zoo holds deltas side by side: {folder.parent / self.out.name}, say",
                )

    def _refuse_existing(self) -> None:
        if not self.out.exists():
            return
        if not self._overwrite:
            raise DeltafoldError(
                "exists", f"{self._given} exists.", fix="choose another -o, or --overwrite"
            )
        ours = ("delta_config.json", "config.json", "adapter_config.json")
        if not self.out.is_dir() or not any((self.out / name).is_file() for name in ours):
            raise DeltafoldError(
                "exists",
                f"{self._given} exists and is neither a delta nor a checkpoint: it is not replaced.",
                fix="choose another -o, or remove it yourself",
            )

    def _disk_full(self, kept: bool = False) -> DeltafoldError:
        again = "free some space and run the same command again: it goes on where it stopped"
        return DeltafoldError(
            "not-enough-disk",
            f"the disk is full; nothing was written to {self._given}.",
            facts=[("kept", f"what is done, in {self.folder.name}")] if kept else [],
            fix=again if kept else "free some space, or choose another -o",
        )


def _from_outside(error: BaseException | None) -> bool:
    """Whether the same run could end well once what stopped it is gone."""
    if isinstance(error, DeltafoldError):
        return error.code in (
            *("not-enough-disk", "not-enough-memory"),
            *("not-found", "truncated", "input-changed"),
        )
    return error is not None and not isinstance(error, AssertionError)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
