"""Applying deltas while a model runs: the zoo, residency, wrapped layers, kernels and engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltafold.runtime.engine import (
    Chunk,
    Embeddings,
    Engine,
    Message,
    Output,
    Request,
    Sampling,
    Stats,
    Ticket,
    TokenLogprob,
    VariantInfo,
)

if TYPE_CHECKING:
    from deltafold.runtime.embedded import EmbeddedEngine as EmbeddedEngine

__all__ = [
    "Chunk",
    "EmbeddedEngine",
    "Embeddings",
    "Engine",
    "Message",
    "Output",
    "Request",
    "Sampling",
    "Stats",
    "Ticket",
    "TokenLogprob",
    "VariantInfo",
]


def __getattr__(name: str) -> Any:
    # The embedded engine brings transformers, which takes seconds to import.
    if name == "EmbeddedEngine":
        from deltafold.runtime.embedded import EmbeddedEngine

        return EmbeddedEngine
    raise AttributeError(f"module 'deltafold.runtime' has no attribute {name!r}")
