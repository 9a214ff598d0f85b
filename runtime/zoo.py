"""The zoo: a folder of delta repos. A variant's name is its folder's; its identity is its digest.

A PEFT LoRA folder in it is a variant too: on first sight it is imported into the cache folder. An
alias (`compress.zoo_aliases`) is one more name of a delta, found by its digest.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from deltafold.compress import DeltafoldError, DeltaRepo
from deltafold.compress.adapter import CONFIG_NAME, WEIGHTS_NAME
from deltafold.compress.fingerprint import Digests
from deltafold.compress.manifest import MANIFEST_NAME, Quantization
from deltafold.compress.verify import check_coverage
from deltafold.compress.zoo_aliases import ALIASES_NAME, read_aliases
from deltafold.compress.zoo_list import no_delta_behind

#: How a file is recognised as the one that was read: replaced in place, it has another stamp.
Stamp = tuple[int, ...]


@dataclass(frozen=True)
class ZooEntry:
    """A delta repo of the zoo that is whole and fits the base, or the reason why it is not.

    `root` is the delta's own name where `name` is an alias, else empty.
    """

    name: str
    folder: Path
    stamp: Stamp
    repo: DeltaRepo | None
    error: DeltafoldError | None
    root: str = ""

    def opened(self) -> DeltaRepo:
        """The repo; raises what is wrong with it."""
        if self.error is not None:
            raise self.error
        assert self.repo is not None
        return self.repo


class Zoo:
    """Names to deltas, kept in step with the folder. Thread-safe.

    Args:
        folder: holds delta repos and LoRAs, one folder each; None is an empty zoo.
        base: the base's digests; a delta for another base is refused.
        base_name: as errors show it.
        reserved: names that stand for the base.
        import_lora: makes a delta repo of a LoRA folder and returns its place; without it LoRA
            folders are passed over.
        quantization: how the base that runs is quantised.
    """

    def __init__(
        self,
        folder: Path | None,
        base: Digests,
        base_name: str,
        reserved: Iterable[str],
        import_lora: Callable[[Path], Path] | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        check_folder(folder)
        self.folder = folder
        self._base, self._base_name = base, base_name
        self._reserved = frozenset(reserved)
        self._import_lora = import_lora
        self._quantization = quantization
        self._entries: dict[str, ZooEntry] = {}
        self._aliases: tuple[Stamp, dict[str, str], DeltafoldError | None] | None = None
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        self.rescan()

    def rescan(self) -> None:
        """Look at the folder again; only what is new or was replaced is read.

        Names that are known are answered meanwhile: a LoRA may take long to import.
        """
        for folder in self._delta_folders():
            self._refresh(folder)
        with self._lock:
            # Asked now, not taken from the list above: another thread may have found more since.
            gone = [n for n, e in self._entries.items() if not self._is_variant(e.folder)]
            for name in gone:
                del self._entries[name]

    def entries(self) -> list[ZooEntry]:
        """Every delta repo of the folder and every alias, broken ones too, by name."""
        with self._lock:
            found = dict(self._entries)
        aliases, error = self._read_aliases()
        if error is not None and self.folder is not None:
            path = self.folder / ALIASES_NAME
            found[ALIASES_NAME] = ZooEntry(ALIASES_NAME, path, (), None, error)
        for alias, digest in aliases.items():
            # A folder's name is the folder's, whatever the file says.
            found.setdefault(alias, self._alias(alias, digest))
        return [found[name] for name in sorted(found)]

    def find(self, name: str) -> ZooEntry:
        """The entry behind a name; its folder is looked at where it is not known yet.

        Raises:
            DeltafoldError: `variant-not-found`, naming near ones.
        """
        entry = self._current(name)
        if entry is None:
            # Through the list: a name that a client sent is never made a path.
            folder = next((f for f in self._delta_folders() if f.name == name), None)
            entry = None if folder is None else self._refresh(folder)
        if entry is None:
            entry = self._find_alias(name)
        if entry is None:
            self.rescan()
            raise self._not_found(name)
        return entry

    def holds(self, name: str) -> bool:
        """Whether a folder of the zoo has this name, read before or not."""
        return (
            self._current(name) is not None
            or name in self._read_aliases()[0]
            or any(folder.name == name for folder in self._delta_folders())
        )

    def _find_alias(self, name: str) -> ZooEntry | None:
        """What an alias stands for now, by the file and the folders as they are."""
        aliases, error = self._read_aliases()
        if error is not None:
            raise error
        if name not in aliases:
            return None
        entry = self._alias(name, aliases[name])
        if entry.repo is None or self._current(entry.root) is None:
            self.rescan()
            entry = self._alias(name, aliases[name])
        return entry

    def _alias(self, alias: str, digest: str) -> ZooEntry:
        with self._lock:
            known = [e for e in self._entries.values() if e.repo and e.repo.digest == digest]
        place = self.folder or Path()
        if alias in self._reserved:
            return ZooEntry(alias, place, (), None, _name_of_the_base(f"the alias {alias}"))
        if not known:
            return ZooEntry(alias, place, (), None, no_delta_behind(alias, digest))
        first = min(known, key=lambda entry: entry.name)
        return replace(first, name=alias, root=first.name)

    def _read_aliases(self) -> tuple[dict[str, str], DeltafoldError | None]:
        """The file of aliases, read again where it was replaced; or what is wrong with it."""
        if self.folder is None:
            return {}, None
        try:
            stamp = _stamp_of(self.folder / ALIASES_NAME)
        except OSError:
            return {}, None
        if self._aliases is None or self._aliases[0] != stamp:
            try:
                self._aliases = stamp, read_aliases(self.folder), None
            except DeltafoldError as error:
                self._aliases = stamp, {}, error
        return self._aliases[1:]

    def _current(self, name: str) -> ZooEntry | None:
        with self._lock:
            entry = self._entries.get(name)
        if entry is None or entry.stamp != _stamp(entry.folder) or _may_heal(entry):
            return None
        return entry

    def _refresh(self, folder: Path) -> ZooEntry:
        """The entry of a folder as it is now, read by one thread alone and without the lock."""
        known = self._current(folder.name)
        if known is not None:
            return known
        with self._lock:
            flight = self._opening.setdefault(folder.name, threading.Lock())
        with flight:
            known = self._current(folder.name)
            if known is None:
                known = self._open_settled(folder)
                with self._lock:
                    self._entries[folder.name] = known
            return known

    def _open_settled(self, folder: Path) -> ZooEntry:
        """Open a folder; once more if it failed because it was being replaced."""
        for _ in range(3):
            stamp = _stamp(folder)
            entry = self._open(folder, stamp)
            if entry.error is None or _stamp(folder) == stamp:
                break
        return entry

    def _delta_folders(self) -> list[Path]:
        if self.folder is None:
            return []
        return sorted(
            path
            for path in self.folder.iterdir()
            if not path.name.startswith(".")
            and not path.name.endswith(".partial")
            and self._is_variant(path)
        )

    def _is_variant(self, folder: Path) -> bool:
        return (folder / MANIFEST_NAME).is_file() or self._is_lora(folder)

    def _is_lora(self, folder: Path) -> bool:
        return self._import_lora is not None and (folder / CONFIG_NAME).is_file()

    def _repo(self, folder: Path) -> DeltaRepo:
        if self._import_lora is None or (folder / MANIFEST_NAME).is_file():
            return DeltaRepo.open(folder)
        return DeltaRepo.open(self._import_lora(folder))

    def _open(self, folder: Path, stamp: Stamp) -> ZooEntry:
        try:
            if folder.name in self._reserved:
                raise _name_of_the_base(str(folder))
            repo = self._repo(folder)
            repo.check_base(self._base, given=self._base_name)
            check_coverage(repo, self._base)
            repo.check_quantization(self._quantization)
        except DeltafoldError as error:
            return ZooEntry(folder.name, folder, stamp, None, error)
        return ZooEntry(folder.name, folder, stamp, repo, None)

    def _not_found(self, name: str) -> DeltafoldError:
        names = [e.name for e in self.entries() if e.error is None]
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
        return DeltafoldError(
            "variant-not-found",
            f"there is no variant called {name!r}.",
            facts=[("near names", ", ".join(near) or "the zoo is empty")],
            fix="GET /v1/models lists what is served",
        )


def check_folder(folder: str | Path | None) -> None:
    """Refuse what cannot be a zoo; quick, so that it can be asked before a base is loaded.

    Raises:
        DeltafoldError: `not-found`, `bad-argument`.
    """
    if folder is None:
        return
    folder = Path(folder)
    if not folder.is_dir():
        raise DeltafoldError(
            "not-found",
            f"the zoo {folder} is not a folder.",
            fix="give a folder of deltas, as `deltafold zoo add` makes it",
        )
    if (folder / MANIFEST_NAME).is_file():
        raise DeltafoldError(
            "bad-argument",
            f"the zoo {folder} is itself a delta.",
            fix=f"give the folder that holds it: --zoo {folder.parent}",
        )


def _may_heal(entry: ZooEntry) -> bool:
    """Whether what a delta lacks may have come since, though its own folder is as it was."""
    return entry.error is not None and entry.error.code == "not-found"


def _name_of_the_base(what: str) -> DeltafoldError:
    return DeltafoldError(
        "bad-argument",
        f"{what} has the name of the base.",
        fix="rename it: a folder's name is the variant's",
    )


def _stamp(folder: Path) -> Stamp:
    try:
        return _stamp_of(folder / MANIFEST_NAME)
    except OSError:
        pass
    try:
        return _stamp_of(folder / WEIGHTS_NAME) + _stamp_of(folder / CONFIG_NAME)
    except OSError:
        return (0, 0, 0)


def _stamp_of(path: Path) -> Stamp:
    stat = path.stat()
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
