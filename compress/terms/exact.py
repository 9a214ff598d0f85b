"""The fine-tune's own values, as they are.

What is served is still a difference, taken against the base when it is read, so that a scale
multiplies it like any other term; at scale 1 the stored value itself is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from deltafold.compress import dtypes
from deltafold.compress.terms.base import Checked, Context, Encoded, Parts, PartSpec, register


@register
@dataclass(frozen=True)
class Exact(Checked):
    """Part: `value`, the fine-tune's shape and dtype (`dtype` is filled in by encode)."""

    id: ClassVar[str] = "exact"
    version: ClassVar[int] = 1

    dtype: str = "BF16"

    def __post_init__(self) -> None:
        self._require(self.dtype in dtypes.TORCH, f"unknown dtype {self.dtype!r}")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Takes `context.variant`; the delta itself is not looked at."""
        assert context.variant is not None
        value = context.variant.contiguous().clone()
        return Encoded(replace(self, dtype=dtypes.NAMES[value.dtype]), {"value": value})

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """Value minus base, float32 (the value itself where the base has no such tensor)."""
        value = parts["value"].to(torch.float32).reshape(shape)
        return value if context.base is None else value - context.base.to(torch.float32)

    def restore(
        self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, context: Context
    ) -> torch.Tensor:
        """The stored tensor."""
        return parts["value"].reshape(shape)

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of the part."""
        return {"value": PartSpec(dtypes.TORCH[self.dtype], shape)}
