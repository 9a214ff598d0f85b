"""Which machines have our GPU kernels."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


def applies_packed(device: torch.device) -> bool:
    """Whether deltas are applied on this device by our GPU kernels, without being decoded."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
