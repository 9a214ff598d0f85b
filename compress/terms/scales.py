"""Scales on disk: float32, or float16 with one float32 unit so that no scale under- or overflows.

Deltas are of the order 1e-4, where float16 already loses bits; divided by the largest scale they use
its range well: the relative error stays below 2**-11 down to 2**-14 of the largest.
"""

from __future__ import annotations

import torch

from deltafold.compress.terms.base import PartSpec

FORMATS = ("float32", "float16")


def store(values: torch.Tensor, fmt: str, key: str) -> dict[str, torch.Tensor]:
    """float32 values as parts: `key`, and `key_unit` (float32 `[1]`) where `fmt` is float16."""
    if fmt == "float32":
        return {key: values.to(torch.float32).contiguous()}
    largest = values.abs().amax() if values.numel() else values.new_zeros(())
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    half = (values / unit).to(torch.float16).contiguous()
    return {key: half, f"{key}_unit": unit.to(torch.float32).reshape(1)}


def load(parts: dict[str, torch.Tensor], fmt: str, key: str) -> torch.Tensor:
    """The float32 values behind `store`'s parts."""
    if fmt == "float32":
        return parts[key]
    return parts[key].to(torch.float32) * parts[f"{key}_unit"]


def specs(shape: tuple[int, ...], fmt: str, key: str) -> dict[str, PartSpec]:
    """What `store` writes for values of `shape`."""
    if fmt == "float32":
        return {key: PartSpec(torch.float32, shape)}
    return {
        key: PartSpec(torch.float16, shape),
        f"{key}_unit": PartSpec(torch.float32, (1,)),
    }
