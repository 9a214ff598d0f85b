"""Uniform codes: `D ~ (q - 2**(b-1)) * s`, b bits a weight, one scale a row or group of columns.

Zero is one of the levels, so what the fine-tune left alone stays alone. The grid has one more level
below zero than above; the scale carries a sign so that the group's largest entry lies on the longer
side. The scale is chosen by squared error among shrunken candidates of the absolute maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress import bits as packing
from deltafold.compress import fast_grid
from deltafold.compress.fast import Pair
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

#: Shares of the absolute maximum that are tried as the grid's end. Low-bit grids clip hard.
_SHRINK = {
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    3: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7),
    5: (1.0, 0.95, 0.9, 0.85, 0.8),
    6: (1.0, 0.95, 0.9),
    7: (1.0,),
    8: (1.0,),
}


@register
@dataclass(frozen=True)
class Codes(Checked):
    """Symmetric grid codes.

    Parts: `codes` uint8 `[N, ceil(M * bits / 8)]`, low bits first; `scales` `[N, groups]`, and
    `scales_unit` for float16. `group` 0 is one scale a row.
    """

    id: ClassVar[str] = "codes"
    version: ClassVar[int] = 1

    bits: int = 4
    group: int = 0
    scale_format: str = "float16"

    def __post_init__(self) -> None:
        self._require(2 <= self.bits <= 8, f"bits must be 2 to 8, not {self.bits}")
        self._require(self.group >= 0, "group must not be negative")
        self._require(self.scale_format in scales.FORMATS, "scale_format: float32 or float16")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Codes of a float32 delta of any shape."""
        return self.encode_pair(Pair.of(delta.reshape(rows_and_columns(tuple(delta.shape)))))

    def encode_pair(self, pair: Pair) -> Encoded:
        """Codes of the difference of two matrices."""
        width, half = self._width(pair.shape[1]), 2 ** (self.bits - 1)
        shares = [-share / half for share in _SHRINK[self.bits]]
        best = fast_grid.best_scales(pair, width, self.bits, shares)
        stored = scales.store(best, self.scale_format, "scales")
        scale = scales.load(stored, self.scale_format, "scales")
        codes = fast_grid.codes(pair, width, self.bits, scale)
        return Encoded(self, {"codes": codes, **stored})

    def missed(self, pair: Pair, parts: Parts) -> float:
        """`||D - decode||_F^2` of the difference of two matrices; neither is written to memory."""
        width, scale = self._width(pair.shape[1]), self._scale(parts)
        return fast_grid.codes_missed(pair, width, self.bits, scale, parts["codes"])

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The levels, float32 of `shape`."""
        _, columns = rows_and_columns(shape)
        width, scale = self._width(columns), self._scale(parts)
        return fast_grid.values(parts["codes"], columns, width, self.bits, scale).reshape(shape)

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(int16 `[N, M]` centred codes, float32 `[N, M]`-broadcastable scales)."""
        _, columns = rows_and_columns(shape)
        codes = packing.unpack(parts["codes"], self.bits, columns).to(torch.int16)
        scale = fast_grid.spread(self._scale(parts), self._width(columns), columns)
        return codes - 2 ** (self.bits - 1), scale

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        rows, columns = rows_and_columns(shape)
        width = packing.packed_width(columns, self.bits)
        grid = (rows, self._groups(columns))
        return {
            "codes": PartSpec(torch.uint8, (rows, width)),
            **scales.specs(grid, self.scale_format, "scales"),
        }

    def _width(self, columns: int) -> int:
        # Never wider than the tensor: a group of 10**9 must not be padded to its full width.
        return min(self.group or columns, max(columns, 1)) or 1

    def _groups(self, columns: int) -> int:
        return -(-columns // self._width(columns)) if columns else 0

    def _scale(self, parts: Parts) -> torch.Tensor:
        """float32 `[N, groups]`."""
        return scales.load(dict(parts), self.scale_format, "scales")
