"""Between an engine and the deltas: who holds variants, and which batch row belongs to which.

An engine knows requests, tokens and key-value memory; a `DeltaHost` knows deltas. The engine
acquires a variant once per request, names the variant of every batch row before a forward pass, and
releases the variant when the request ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from deltafold.runtime.engine import VariantInfo


class Variant(Protocol):
    """A loaded variant. The base has none: it is None wherever a variant may stand."""

    @property
    def name(self) -> str:
        """Served name."""
        ...

    @property
    def digest(self) -> str:
        """The delta's content digest, `sha256:...`; part of every cache key."""
        ...

    @property
    def folder(self) -> Path:
        """The delta repo, with the variant's own tokenizer and configuration."""
        ...

    @property
    def model(self) -> Any | None:
        """A dense model that is the variant itself and runs no other's rows; None where its delta
        is applied to the shared model's rows.
        """
        ...


class Row(NamedTuple):
    """What one batch row runs: a variant (None is the base) and the scale of its delta."""

    variant: Variant | None
    scale: float = 1.0


class DeltaHost(Protocol):
    """Holds the zoo's variants for one wrapped model."""

    base_name: str
    base_folder: Path

    def variants(self) -> list[VariantInfo]:
        """The base first, then every variant by name."""
        ...

    def resolve(self, name: str) -> VariantInfo:
        """Raises `variant-not-found`, naming near ones."""
        ...

    def acquire(self, name: str) -> Variant | None:
        """Load a variant if it is not resident and keep it until `release`. Thread-safe.

        Returns None for the base. Blocks while reading from disk; must not be called on the
        engine's stepping thread. Raises every error that loading can give.
        """
        ...

    def release(self, variant: Variant | None) -> None:
        """Undo one `acquire`; the variant may then be evicted."""
        ...

    def batch(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Within it, row i of every forward pass's batch dimension runs `rows[i]`.

        Rows of the base get bit-identical results to a model that was never wrapped.
        """
        ...

    def resident(self) -> dict[str, int]:
        """Bytes held in memory by variant name."""
        ...
