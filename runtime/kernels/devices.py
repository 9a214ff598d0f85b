"""Which machines have our GPU kernels."""

from __future__ import annotations

import importlib.metadata
from functools import cache

import torch


def applies_packed(device: torch.device) -> bool:
    """Whether deltas are applied on this device by our GPU kernels, without being decoded."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    """Triton comes with torch's builds for Linux; older ones lack what the kernels are written in."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) >= (3, 5)
