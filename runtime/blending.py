"""A mixture in memory: the forms of loaded variants, each times its weight. Nothing large is copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from deltafold.compress import DeltafoldError, DeltaRepo
from deltafold.compress.companions import check_tokenizer
from deltafold.compress.naming import own_names
from deltafold.runtime.kernels.base import DeltaMatrix, Scaled, Sum
from deltafold.runtime.loading import LoadedVariant

#: A loaded variant, or one of its parts, and its weight.
Weighted: TypeAlias = tuple[LoadedVariant, float]


def blend(digest: str, folder: Path, parts: Sequence[Weighted]) -> LoadedVariant:
    """The variant whose delta is the weighted sum of others'.

    Args:
        digest: of the mixture.
        folder: of the delta repo whose tokenizer it uses.
        parts: loaded variants and their weights; they must outlive the mixture.
    """
    mixed = LoadedVariant(digest, folder, borrowed=True)
    for variant, _ in parts:
        mixed.homes |= variant.homes
        mixed.sizes |= variant.sizes
        mixed.applied |= variant.applied
    mixed.products = _forms([(v.products, w) for v, w in parts])
    mixed.tables = _forms([(v.tables, w) for v, w in parts])
    for variant, weight in parts:
        for module, vectors in variant.vectors.items():
            for path, delta in vectors.items():
                # The weight of a linear layer or table is read in its form alone.
                if path == "weight" and (module in mixed.products or module in mixed.tables):
                    continue
                known = mixed.vectors.setdefault(module, {})
                scaled = delta * weight
                known[path] = known[path] + scaled if path in known else scaled
        for module, stacks in variant.stacks.items():
            for path, stack in stacks.items():
                mine = mixed.stacks.setdefault(module, {})
                part = stack.scaled(weight)
                mine[path] = mine[path].plus(part) if path in mine else part
    return mixed


def _forms(parts: Sequence[tuple[dict[str, DeltaMatrix], float]]) -> dict[str, DeltaMatrix]:
    found: dict[str, list[DeltaMatrix]] = {}
    for forms, weight in parts:
        for module, form in forms.items():
            found.setdefault(module, []).append(Scaled(form, weight))
    return {m: terms[0] if len(terms) == 1 else Sum(terms) for m, terms in found.items()}


def check_mixable(first: DeltaRepo, other: DeltaRepo) -> None:
    """Raises `engine-unsupported` unless two variants have the same tokens."""
    shapes = _resized(first) == _resized(other)
    if not shapes or check_tokenizer(first.folder, other.folder, accepted=True):
        raise DeltafoldError(
            "engine-unsupported",
            f"{first.folder.name} and {other.folder.name} cannot be mixed: their tokens differ.",
            facts=[
                (r.folder.name, f"tables {_resized(r) or 'as in the base'}") for r in (first, other)
            ],
            fix="mix variants that added the same tokens, or none",
        )


def _resized(repo: DeltaRepo) -> dict[str, list[int]]:
    """Tables with other rows than the base's, by the base's own names; a table that is one with another
    in the base has as many as that.
    """
    untied = repo.manifest.untied or {}
    return {
        _own(repo, name): list(entry.shape)
        for name, entry in sorted(repo.manifest.tensors.items())
        if name not in untied
        and entry.base_shape is not None
        and tuple(entry.base_shape) != tuple(entry.shape)
    }


def _own(repo: DeltaRepo, name: str) -> str:
    likely = own_names(repo.manifest.base_names, name)
    return next(own for own in likely if own in repo.base_tensors)


@dataclass
class _Seat:
    mixed: LoadedVariant
    name: str
    users: int = 0


class Blends:
    """Mixtures in use by digest, so that equal requests share a batch's group. Thread-safe.

    A mixture that nobody uses any more is dropped at once: it would keep the variants' memory, and is
    made again in no time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seats: dict[str, _Seat] = {}
        self._known: set[tuple[str, str]] = set()

    def check(self, repos: Sequence[DeltaRepo]) -> None:
        """`check_mixable`, done once for each two variants: it may have to read their tokenizers."""
        for other in repos[1:]:
            pair = (repos[0].digest, other.digest)
            if pair not in self._known:
                check_mixable(repos[0], other)
                self._known.add(pair)

    def acquire(self, digest: str, name: str, make: Callable[[], LoadedVariant]) -> LoadedVariant:
        """The mixture behind a digest, made if need be; it stays until `release`."""
        with self._lock:
            seat = self._seats.get(digest)
            if seat is None:
                seat = self._seats[digest] = _Seat(make(), name)
            seat.users += 1
            return seat.mixed

    def release(self, digest: str) -> None:
        """Undo one `acquire`."""
        with self._lock:
            seat = self._seats[digest]
            seat.users -= 1
            if not seat.users:
                del self._seats[digest]

    def resident(self) -> dict[str, int]:
        """Bytes that mixtures take besides their variants', by name."""
        with self._lock:
            return {seat.name: seat.mixed.nbytes for seat in self._seats.values()}
