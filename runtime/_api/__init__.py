"""deltafold: many full fine-tunes of one model as small deltas, served together.

The short public API; everything is imported on first use, so that `import deltafold` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltafold.compress import DeltafoldError as DeltafoldError
    from deltafold.compress import DeltaRepo as DeltaRepo
    from deltafold.compress import Recipe as Recipe
    from deltafold.compress import compress_checkpoint as compress_checkpoint
    from deltafold.compress import restore_checkpoint as restore_checkpoint
    from deltafold.compress import verify_delta as verify_delta
    from deltafold.runtime import EmbeddedEngine as EmbeddedEngine
    from deltafold.runtime import Embeddings as Embeddings
    from deltafold.runtime import PoolingEngine as PoolingEngine
    from deltafold.runtime import PoolRequest as PoolRequest
    from deltafold.runtime import Request as Request
    from deltafold.runtime import Sampling as Sampling

_HOMES = {
    "DeltafoldError": "deltafold.compress",
    "DeltaRepo": "deltafold.compress",
    "Recipe": "deltafold.compress",
    "compress_checkpoint": "deltafold.compress",
    "restore_checkpoint": "deltafold.compress",
    "verify_delta": "deltafold.compress",
    "EmbeddedEngine": "deltafold.runtime",
    "PoolRequest": "deltafold.runtime",
    "PoolingEngine": "deltafold.runtime",
    "Embeddings": "deltafold.runtime",
    "Request": "deltafold.runtime",
    "Sampling": "deltafold.runtime",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltafold' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
