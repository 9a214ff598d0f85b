"""N:M sparsity with coded values: of every M columns of a row, N are kept.

2:4 with 2 or 4 bits is the layout of DeltaZip (arXiv 2312.05215, section 4); its quality at 2 bits
comes from error feedback while coding, which needs activations. 1:16 with 4 bits is *stratified*
dropout: one entry of every 16, half a byte for its place and half for its value, no row pointers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress import bits as packing
from deltafold.compress.errors import DeltafoldError
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
from deltafold.compress.terms.grids import Coded, Grid

#: The width that stands for plain float16 values.
HALF = 16


@register
@dataclass(frozen=True)
class NM(Checked):
    """`keep` of every `of` columns; the last block of a row is filled up with zeros.

    With K = keep * ceil(M / of) entries a row: `positions` uint8 `[N, ceil(K * p / 8)]` with p bits a
    position in its block, ascending within a block; `codes` uint8 `[N, ceil(K * bits / 8)]` and
    `scales` `[N, G]`, `scales_unit`; for 16 bits `values` float16 `[N, K]` and `values_unit` instead.

    Attributes:
        keep: N.
        of: M of N:M, 2 to 256; a power of two wastes no bits.
        bits: 2 to 8 (symmetric codes), or 16 (float16 values).
        group: kept entries of a row that share a scale; 0 is the whole row.
        scale_format: "float32" or "float16".
    """

    id: ClassVar[str] = "nm"
    version: ClassVar[int] = 1

    keep: int = 2
    of: int = 4
    bits: int = 4
    group: int = 0
    scale_format: str = "float16"

    def __post_init__(self) -> None:
        self._require(2 <= self.of <= 256, f"of must be 2 to 256, not {self.of}")
        self._require(1 <= self.keep < self.of, "keep must be at least 1 and below of")
        self._require(2 <= self.bits <= 8 or self.bits == HALF, "bits must be 2 to 8, or 16")
        self._require(self.group >= 0, "group must not be negative")
        self._require(self.scale_format in scales.FORMATS, "scale_format: float32 or float16")

    @property
    def position_bits(self) -> int:
        """Bits of a position within its block."""
        return (self.of - 1).bit_length()

    @property
    def grid(self) -> Grid:
        """How the kept entries of a row are coded."""
        return Grid(self.bits, self.group, symmetric=True, scale_format=self.scale_format)

    def kept(self, columns: int) -> int:
        """K: kept entries of a row of `columns`."""
        return self.keep * -(-columns // self.of)

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """The largest entries of each block of a float32 delta, nearest codes."""
        matrix = delta.reshape(rows_and_columns(tuple(delta.shape)))
        positions = self.largest(matrix)
        return self.assemble(positions, self.code(self.pick(matrix, positions)))

    def code(self, values: torch.Tensor) -> torch.Tensor | Coded:
        """Kept values `[N, K]` on the best grid; for 16 bits the values themselves."""
        return values if self.bits == HALF else self.grid.code(values)

    def largest(self, matrix: torch.Tensor) -> torch.Tensor:
        """Places of the largest entries by magnitude: int64 `[N, K]` within their blocks."""
        blocks = self._blocks(matrix).abs()
        # Sorted stably, so that ties go the same way on every machine.
        order = blocks.argsort(dim=-1, descending=True, stable=True)[..., : self.keep]
        return order.sort(dim=-1).values.reshape(matrix.shape[0], self.kept(matrix.shape[1]))

    def pick(self, matrix: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The entries of `[N, M]` at those places: `[N, K]`; zeros beyond the last column."""
        blocks = self._blocks(matrix)
        places = positions.reshape(*blocks.shape[:2], self.keep)
        return blocks.gather(-1, places).reshape(positions.shape)

    def assemble(self, positions: torch.Tensor, coded: torch.Tensor | Coded) -> Encoded:
        """Parts from places and values that somebody else chose.

        Args:
            positions: int64 `[N, K]` as `largest` gives them.
            coded: codes of the kept entries on `grid`, or for 16 bits float32 values `[N, K]`.
        """
        stored = positions.to(torch.uint8).contiguous()
        parts = {"positions": packing.pack(stored, self.position_bits)}
        if isinstance(coded, Coded):
            parts["codes"] = packing.pack(coded.codes, self.bits)
            parts |= self.grid.store_scales(coded.scales, "")
        else:
            parts |= scales.store(coded, "float16", "values")
        return Encoded(self, parts)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The kept entries in their places, float32 of `shape`."""
        rows, columns = rows_and_columns(shape)
        count = self.kept(columns)
        places = self.columns(parts, shape, context.name)
        if self.bits == HALF:
            values = scales.load(dict(parts), "float16", "values")
        else:
            codes = packing.unpack(parts["codes"], self.bits, count)
            values = self.grid.values(Coded(codes, self.grid.load_scales(parts, "", count)))
        out = torch.zeros(rows, -(-columns // self.of) * self.of)
        out.scatter_(1, places, values)
        return out[:, :columns].reshape(shape)

    def columns(self, parts: Parts, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Column of each kept entry: int64 `[N, K]`; those beyond M hold fillings."""
        _, columns = rows_and_columns(shape)
        count = self.kept(columns)
        places = packing.unpack(parts["positions"], self.position_bits, count).to(torch.int64)
        blocks = places.reshape(places.shape[0], -(-columns // self.of), self.keep)
        ascend = bool((blocks[..., 1:] > blocks[..., :-1]).all())
        if places.numel() and not (ascend and int(places.max()) < self.of):
            raise DeltafoldError(
                "bad-manifest", f"{name}: positions do not ascend within blocks of {self.of}."
            )
        starts = torch.arange(count) // self.keep * self.of
        return places + starts

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        rows, columns = rows_and_columns(shape)
        count = self.kept(columns)
        width = packing.packed_width(count, self.position_bits)
        specs = {"positions": PartSpec(torch.uint8, (rows, width))}
        if self.bits == HALF:
            return specs | scales.specs((rows, count), "float16", "values")
        width = packing.packed_width(count, self.bits)
        specs["codes"] = PartSpec(torch.uint8, (rows, width))
        return specs | self.grid.specs(rows, count, "")

    def _blocks(self, matrix: torch.Tensor) -> torch.Tensor:
        rows, columns = matrix.shape
        blocks = -(-columns // self.of)
        padded = torch.nn.functional.pad(matrix, (0, blocks * self.of - columns))
        return padded.reshape(rows, blocks, self.of)
