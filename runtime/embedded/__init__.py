"""The embedded engines: transformers models with variants, in one process."""

from deltafold.runtime.embedded.engine import EmbeddedEngine
from deltafold.runtime.embedded.pooling import PoolingEngine

__all__ = ["EmbeddedEngine", "PoolingEngine"]
