"""Both checkpoints of a run as they were when it began, and what of an earlier run still holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.fingerprint import MOST_THREADS, DigestCache
from deltafold.compress.journal import Record
from deltafold.compress.naming import NamedBase
from deltafold.compress.progress import OnProgress, Progress
from deltafold.compress.several import cores, finished

#: Of each checkpoint, by file name, what tells that a file was changed.
Stamps: TypeAlias = list[dict[str, list[int]]]


class Inputs:
    """A base, and a fine-tune that may be no checkpoint.

    Attributes:
        caches: what is known of the checkpoints' digests.
        stamps: of their files.
    """

    def __init__(self, source: NamedBase, target: TensorSource) -> None:
        self._source, self._target = source, target
        self._checkpoints = [c for c in (source.checkpoint, target) if isinstance(c, Checkpoint)]
        self.caches = [DigestCache(c) for c in self._checkpoints]
        self.stamps: Stamps = [_listed(c.stamps) for c in self.caches]

    def check(self, name: str | None = None) -> None:
        """See that the files of a tensor, of all tensors if None, are what they were.

        Raises:
            DeltafoldError: `input-changed`; `not-found` where one is gone.
        """
        changed = [
            str(c.folder / file)
            for c, before, own in zip(self._checkpoints, self.stamps, self._own(name), strict=True)
            for file, stamp in _listed(c.stamps(own)).items()
            if before[file] != stamp
        ]
        if changed:
            raise DeltafoldError(
                "input-changed",
                "a checkpoint was changed while it was read.",
                facts=[("changed", name_some(changed, len(changed)))],
                fix="let nothing write to it",
            )

    def stale(
        self, records: Mapping[str, Record], stamps: Stamps | None, progress: OnProgress
    ) -> list[str]:
        """Of finished tensors those that are no longer what they were.

        Files that look otherwise than when a tensor was finished may still have the same content:
        their tensors are hashed again.

        Args:
            records: finished tensors of an earlier run.
            stamps: of the files that it read.
            progress: called after every tensor that is hashed.
        """
        if not records or stamps == self.stamps:
            return []
        suspects = [n for n in records if stamps is None or self._suspect(n, stamps)]
        gone: list[str] = []

        def compare(name: str) -> None:
            record = records[name]
            base = self._source.sha256(name) if name in self._source else None
            if (record.base, record.variant) != (base, self._target.sha256(name)):
                gone.append(name)

        threads = cores(MOST_THREADS) if len(suspects) > 1 else 1
        for done, name in enumerate(finished(compare, suspects, threads), 1):
            nbytes = sum(
                c.nbytes(own)
                for c, names in zip(self._checkpoints, self._own(name), strict=True)
                for own in names or ()
            )
            progress(Progress("hash", name, done, len(suspects), nbytes))
        return sorted(gone)

    def _suspect(self, name: str, stamps: Stamps) -> bool:
        return any(
            before.get(file) != now[file]
            for c, own, before, now in zip(
                self._checkpoints, self._own(name), stamps, self.stamps, strict=True
            )
            for file in c.stamps(own)
        )

    def _own(self, name: str | None) -> list[list[str] | None]:
        """By checkpoint the names of a tensor there: none or one; None stands for all."""
        if name is None:
            return [None for _ in self._checkpoints]
        own = self._source.own(name)
        found: list[list[str] | None] = [[] if own is None else [own], [name]]
        return found[: len(self._checkpoints)]


def _listed(stamps: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """As JSON gives them back."""
    return {name: list(stamp) for name, stamp in stamps.items()}
