"""Residual sign planes with a scale for each input column: `D[n, m] ~ sum_i c_i[m] S_i[n, m]`.

The other half of arXiv 2512.19720, which gives a matrix scales a row or a column, whichever fits its
layer better. Applied as `y = (x * c) S^T`: the scale meets the activations before the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress import bits as packing
from deltafold.compress.terms import scales
from deltafold.compress.terms.base import (
    Checked,
    Context,
    Encoded,
    Parts,
    PartSpec,
    register,
    rows_and_columns,
)


@register
@dataclass(frozen=True)
class ColumnPlanes(Checked):
    """Sign planes with a scale a column.

    Parts: `signs` uint8 `[bits, N, ceil(M/8)]` as in `planes`; `scales` `[bits, M]`, and `scales_unit`
    for float16.

    Attributes:
        bits: planes, 1 to 8.
        scale_format: "float32" or "float16".
    """

    id: ClassVar[str] = "column-planes"
    version: ClassVar[int] = 1

    bits: int = 1
    scale_format: str = "float16"

    def __post_init__(self) -> None:
        self._require(1 <= self.bits <= 8, f"bits must be 1 to 8, not {self.bits}")
        self._require(self.scale_format in scales.FORMATS, "scale_format: float32 or float16")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Planes of a float32 delta; each plane sees what the stored ones before it left."""
        rest = delta.reshape(rows_and_columns(tuple(delta.shape)))
        signs, levels, units = [], [], []
        for _ in range(self.bits):
            plus = rest >= 0
            means = rest.abs().mean(dim=0) if rest.shape[0] else torch.zeros(rest.shape[1])
            parts = scales.store(means, self.scale_format, "scales")
            level = scales.load(parts, self.scale_format, "scales")
            rest = rest - torch.where(plus, level, -level)
            signs.append(packing.pack(plus.to(torch.uint8), 1))
            levels.append(parts["scales"])
            units += [parts["scales_unit"]] if "scales_unit" in parts else []
        stored = {"signs": torch.stack(signs), "scales": torch.stack(levels)}
        if units:
            stored["scales_unit"] = torch.cat(units)
        return Encoded(self, stored)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The sum of the planes, float32 of `shape`."""
        rows, columns = rows_and_columns(shape)
        total = torch.zeros(rows, columns)
        for signs, level in zip(parts["signs"], self.levels(parts), strict=True):
            plus = packing.unpack(signs, 1, columns).bool()
            total += torch.where(plus, level, -level)
        return total.reshape(shape)

    def levels(self, parts: Parts) -> torch.Tensor:
        """float32 `[bits, M]`."""
        values = parts["scales"].to(torch.float32)
        if self.scale_format == "float16":
            values = values * parts["scales_unit"].reshape(-1, 1)
        return values

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        rows, columns = rows_and_columns(shape)
        half = self.scale_format == "float16"
        width = packing.packed_width(columns, 1)
        specs = {
            "signs": PartSpec(torch.uint8, (self.bits, rows, width)),
            "scales": PartSpec(torch.float16 if half else torch.float32, (self.bits, columns)),
        }
        if half:
            specs["scales_unit"] = PartSpec(torch.float32, (self.bits,))
        return specs
