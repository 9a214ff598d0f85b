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
        rows, columns = rows_and_columns(tuple(delta.shape))
        width = self._width(columns)
        groups = self._groups(columns)
        padded = torch.nn.functional.pad(
            delta.reshape(rows, columns), (0, groups * width - columns)
        ).reshape(rows, groups, width)
        stored = scales.store(self._best_scales(padded), self.scale_format, "scales")
        scale = scales.load(stored, self.scale_format, "scales").unsqueeze(-1)
        codes = self._quantise(padded, scale) + 2 ** (self.bits - 1)
        codes = codes.to(torch.uint8).reshape(rows, groups * width)[:, :columns]
        return Encoded(self, {"codes": packing.pack(codes.contiguous(), self.bits), **stored})

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The levels, float32 of `shape`."""
        codes, scale = self.grid(parts, shape)
        return (codes.to(torch.float32) * scale).reshape(shape)

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(int16 `[N, M]` centred codes, float32 `[N, M]`-broadcastable scales)."""
        _, columns = rows_and_columns(shape)
        codes = packing.unpack(parts["codes"], self.bits, columns).to(torch.int16)
        scale = scales.load(dict(parts), self.scale_format, "scales")
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(self._width(columns), dim=1)[:, :columns]
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

    def _quantise(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        half = 2 ** (self.bits - 1)
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        return torch.round(values / safe).clamp(-half, half - 1)

    def _best_scales(self, groups: torch.Tensor) -> torch.Tensor:
        half = 2 ** (self.bits - 1)
        if groups.shape[-1] == 0 or groups.numel() == 0:
            return torch.zeros(groups.shape[:-1])
        peak = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
        best, least = torch.zeros_like(peak), torch.full_like(peak, torch.inf)
        for share in _SHRINK[self.bits]:
            scale = peak * (-share / half)
            error = groups - self._quantise(groups, scale.unsqueeze(-1)) * scale.unsqueeze(-1)
            loss = error.square().sum(dim=-1)
            better = loss < least
            best, least = torch.where(better, scale, best), torch.where(better, loss, least)
        return best
