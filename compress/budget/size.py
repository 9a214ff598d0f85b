"""What a delta weighs before it is written, to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from deltafold.compress.budget.options import Part
from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.manifest import FORMAT, FORMAT_VERSION
from deltafold.compress.shards import planned_bytes


def companion_bytes(companions: Mapping[str, Path], base: TensorSource) -> int:
    """Bytes of the small files: configuration, tokenizer, and the list of the base's tensors."""
    # A digest is as long as any other, so none has to be known.
    listed = {}
    for name in sorted(base.names()):
        spec = base.spec(name)
        listed[name] = [spec.dtype, list(spec.shape), "0" * 64]
    return sum(p.stat().st_size for p in companions.values()) + len(json.dumps(listed)) + 1


def payload_bytes(parts: Iterable[Part]) -> int:
    """Bytes of the payload's files for parts in the order in which they are written."""
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
    laid: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        (part.key, part.dtype, part.shape) for part in parts
    ]
    return planned_bytes(laid, "delta", metadata)
