"""The difference itself, number by number: what an edited delta is where no smaller form fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.terms import scales
from deltafold.compress.terms.base import Checked, Context, Encoded, Parts, PartSpec, register


@register
@dataclass(frozen=True)
class Dense(Checked):
    """Part: `values`, the tensor's shape; for float16 also `values_unit`.

    Not an exact term: base plus difference rounds to the fine-tune's dtype.
    """

    id: ClassVar[str] = "dense"
    version: ClassVar[int] = 1

    value_format: str = "float32"

    def __post_init__(self) -> None:
        self._require(self.value_format in scales.FORMATS, "value_format: float32 or float16")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """All entries of a float32 delta."""
        parts = scales.store(delta, self.value_format, "values")
        return Encoded(self, {key: part.clone() for key, part in parts.items()})

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The entries, float32 of `shape`."""
        return scales.load(dict(parts), self.value_format, "values").reshape(shape)

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        return scales.specs(shape, self.value_format, "values")
