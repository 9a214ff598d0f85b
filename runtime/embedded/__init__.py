"""The embedded engine: transformers models with variants, in one process."""

from deltafold.runtime.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
