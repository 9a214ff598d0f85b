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
from deltafold.runtime.pooled import PoolRequest, Scores, Vector

if TYPE_CHECKING:
    from deltafold.runtime.embedded import EmbeddedEngine as EmbeddedEngine
    from deltafold.runtime.embedded import PoolingEngine as PoolingEngine

__all__ = [
    "Chunk",
    "EmbeddedEngine",
    "Embeddings",
    "Engine",
    "Message",
    "Output",
    "PoolRequest",
    "PoolingEngine",
    "Request",
    "Sampling",
    "Scores",
    "Stats",
    "Ticket",
    "TokenLogprob",
    "VariantInfo",
    "Vector",
]


def __getattr__(name: str) -> Any:
    # The embedded engines bring torch, which takes seconds to import.
    if name in ("EmbeddedEngine", "PoolingEngine"):
        from deltafold.runtime import embedded

        return getattr(embedded, name)
    raise AttributeError(f"module 'deltafold.runtime' has no attribute {name!r}")
