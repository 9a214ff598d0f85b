"""Dtype names as safetensors writes them, and tensors as raw bytes."""

from __future__ import annotations

import hashlib
from typing import Final

import torch

from deltafold.compress.errors import DeltafoldError

TORCH: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in TORCH.items()}

#: Dtypes whose differences are taken in float32; any other kind of tensor is stored exactly.
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})


def to_torch(name: str, *, where: str, code: str = "not-a-checkpoint") -> torch.dtype:
    """The torch dtype behind a safetensors name; raises `code` where there is none."""
    if name not in TORCH:
        raise DeltafoldError(
            code,
            f"{where} has the dtype {name!r}, which is not supported.",
            facts=[("supported", ", ".join(TORCH))],
        )
    return TORCH[name]


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in memory order, uint8 1-D (a view where the tensor is contiguous)."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def sha256(tensor: torch.Tensor) -> str:
    """Hex digest of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor).numpy().data).hexdigest()
