"""Residual sign planes: `D ~ sum_i a_i * S_i`, one bit a weight and plane.

Source: Liu et al., "BitDelta" (arXiv 2402.10193), section 3.1 for one plane (the L2-optimal scale of
a sign plane is mean|D|) and section 3.3 for several: each plane codes what the planes before it left,
`R_0 = D, S_i = sign(R_i), a_i = mean|R_i|, R_{i+1} = R_i - a_i S_i`. Scales per row after
arXiv 2512.19720. A zero counts as +1, as in the authors' code (their text says -1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltafold.compress import bits as packing
from deltafold.compress import fast_planes
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


@register
@dataclass(frozen=True)
class Planes(Checked):
    """Sign planes with a scale a tensor, a row, or a group of columns of one row.

    Parts: `signs` uint8 `[bits, N, ceil(M/8)]` (bit j of byte k is column 8k+j, 1 is plus);
    `scales` `[bits]`, `[bits, N]` or `[bits, N, ceil(M/group)]`, and `scales_unit` for float16.

    Attributes:
        bits: planes, 1 to 8.
        scale: what one scale covers.
        group: columns a scale covers where `scale` is "group".
        scale_format: "float32" or "float16".
    """

    id: ClassVar[str] = "planes"
    version: ClassVar[int] = 1

    bits: int = 1
    scale: Literal["tensor", "row", "group"] = "row"
    group: int = 0
    scale_format: str = "float16"

    def __post_init__(self) -> None:
        self._require(1 <= self.bits <= 8, f"bits must be 1 to 8, not {self.bits}")
        self._require(
            self.scale in ("tensor", "row", "group"),
            f"scale must be tensor, row or group, not {self.scale!r}",
        )
        self._require((self.group > 0) == (self.scale == "group"), "group goes with scale=group")
        self._require(self.scale_format in scales.FORMATS, "scale_format: float32 or float16")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Planes of a float32 delta of any shape."""
        return self.encode_pair(Pair.of(delta.reshape(rows_and_columns(tuple(delta.shape)))))

    def encode_pair(self, pair: Pair) -> Encoded:
        """Planes of the difference of two matrices."""
        rows, columns = pair.shape
        signs = torch.empty(self.bits, rows, packing.packed_width(columns, 1), dtype=torch.uint8)
        stored: list[dict[str, torch.Tensor]] = []
        levels: list[torch.Tensor] = []
        for _ in range(self.bits):
            known = torch.stack(levels) if levels else torch.empty(0)
            sums = fast_planes.take_plane(pair, self._width(columns), known, signs)
            parts = scales.store(self._means(sums, columns), self.scale_format, "scales")
            # The next plane must see what a reader will see, so it works from the stored scale.
            levels.append(self._per_group(scales.load(parts, self.scale_format, "scales")))
            stored.append(parts)
        return Encoded(self, {"signs": signs, **self._stack(stored)})

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The sum of the planes, float32 of `shape`."""
        rows, columns = rows_and_columns(shape)
        total = torch.zeros(rows, columns)
        for plane, level in zip(parts["signs"], self.levels(parts), strict=True):
            fast_planes.add_plane(total, plane, self._per_group(level), self._width(columns))
        return total.reshape(shape)

    def missed(self, pair: Pair, parts: Parts) -> float:
        """`||D - decode||_F^2` of the difference of two matrices; neither is written to memory."""
        levels = torch.stack([self._per_group(level) for level in self.levels(parts)])
        return fast_planes.planes_missed(pair, self._width(pair.shape[1]), levels, parts["signs"])

    def planes(
        self, parts: Parts, shape: tuple[int, ...]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each plane as (bool `[N, M]`, True is plus; float32 level that broadcasts to it)."""
        _, columns = rows_and_columns(shape)
        levels = self.levels(parts)
        return [
            (
                packing.unpack(parts["signs"][i], 1, columns).bool(),
                self._spread(levels[i], columns),
            )
            for i in range(self.bits)
        ]

    def levels(self, parts: Parts) -> torch.Tensor:
        """float32 `[bits]`, `[bits, N]` or `[bits, N, groups]`."""
        values = parts["scales"].to(torch.float32)
        if self.scale_format == "float16":
            units = parts["scales_unit"]
            values = values * units.reshape(-1, *[1] * (values.dim() - 1))
        return values

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        rows, columns = rows_and_columns(shape)
        width = packing.packed_width(columns, 1)
        inner: tuple[int, ...] = ()
        if self.scale != "tensor":
            inner = (rows,) if self.scale == "row" else (rows, -(-columns // self.group))
        half = self.scale_format == "float16"
        specs = {
            "signs": PartSpec(torch.uint8, (self.bits, rows, width)),
            "scales": PartSpec(torch.float16 if half else torch.float32, (self.bits, *inner)),
        }
        if half:
            specs["scales_unit"] = PartSpec(torch.float32, (self.bits,))
        return specs

    def _means(self, sums: torch.Tensor, columns: int) -> torch.Tensor:
        """Mean magnitudes of sums `[N, groups]`: a scalar, `[N]` or `[N, groups]`."""
        rows, groups = sums.shape
        if self.scale == "tensor":
            # Exactly rounded: a float32 sum over 10^8 weights would lose the mean's last digits.
            return torch.tensor(math.fsum(sums.flatten().tolist()) / max(rows * columns, 1))
        if self.scale == "row":
            return sums[:, 0] / columns if columns else torch.zeros(rows)
        widths = torch.full((groups,), float(self._width(columns)))
        if groups:
            widths[-1] = columns - (groups - 1) * self._width(columns)
        return sums / widths

    def _per_group(self, level: torch.Tensor) -> torch.Tensor:
        """Levels as the loops take them: one, or `[N, groups]`."""
        return level.unsqueeze(1) if self.scale == "row" else level

    def _spread(self, levels: torch.Tensor, columns: int) -> torch.Tensor:
        if self.scale == "tensor":
            return levels.reshape(1, 1)
        if self.scale == "row":
            return levels.reshape(-1, 1)
        return levels.repeat_interleave(self._width(columns), dim=1)[:, :columns]

    def _width(self, columns: int) -> int:
        # Never wider than the tensor: a group of 10**9 must not be padded to its full width.
        return min(self.group or columns, columns) or 1

    def _stack(self, levels: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        stacked = {"scales": torch.stack([level["scales"] for level in levels])}
        if self.scale_format == "float16":
            stacked["scales_unit"] = torch.cat([level["scales_unit"] for level in levels])
        return stacked
