"""Keys and digests of what a payload file holds."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping

import torch

from deltafold.compress import dtypes


def payload_key(tensor: str, index: int, part: str) -> str:
    """The payload's key of one part: `<tensor>.<number of the term>.<part>`."""
    return f"{tensor}.{index}.{part}"


def payload_digest(terms: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """Hex sha256 over the parts of all terms of a tensor, in term order, parts sorted by name.

    Each part adds the length-prefixed JSON `[term, part, dtype, shape]` and its bytes.
    """
    total = hashlib.sha256()
    for index, parts in enumerate(terms):
        for key in sorted(parts):
            tensor = parts[key]
            head = json.dumps(
                [index, key, dtypes.NAMES[tensor.dtype], list(tensor.shape)], separators=(",", ":")
            ).encode()
            total.update(struct.pack("<Q", len(head)) + head)
            total.update(dtypes.raw_bytes(tensor).numpy().data)
    return total.hexdigest()
