"""A sign and the index of a magnitude: `D = sign * table[index]`, 1 + log2(levels) bits a weight.

Source: arXiv 2410.13841, section 4.2, third extension of BitDelta: magnitudes sorted and cut into
blocks, each block standing for its mean. The paper does not say whether blocks hold equal counts nor
what they are taken over; equal counts and a table a tensor (or row) are our reading. Lloyd's levels
have the least squared error at the same size. One level is one sign plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
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

#: Lloyd's iteration gains nothing visible after this many rounds.
_ROUNDS = 300


@register
@dataclass(frozen=True)
class Codebook(Checked):
    """Signs and magnitude indexes.

    Parts: `codes` uint8 `[N, ceil(M * b / 8)]` with b = 1 + log2(levels), the lowest bit of a code 1
    for plus, the others the index; `table` `[1, levels]` or `[N, levels]`, and `table_unit` for
    float16.

    Attributes:
        levels: magnitudes in a table, a power of two from 1 to 128.
        scale: what has a table of its own.
        table_format: "float32" or "float16".
    """

    id: ClassVar[str] = "codebook"
    version: ClassVar[int] = 1

    levels: int = 4
    scale: Literal["tensor", "row"] = "tensor"
    table_format: str = "float32"

    def __post_init__(self) -> None:
        power = self.levels >= 1 and self.levels & (self.levels - 1) == 0
        self._require(power and self.levels <= 128, "levels must be a power of two up to 128")
        self._require(self.scale in ("tensor", "row"), "scale must be tensor or row")
        self._require(self.table_format in scales.FORMATS, "table_format: float32 or float16")

    @property
    def bits(self) -> int:
        """Bits of a code, sign included."""
        return self.levels.bit_length()

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Blocks of equal counts."""
        magnitudes = self._magnitudes(delta)
        index = _blocks(magnitudes, self.levels)
        return self._store(delta, index, _means(magnitudes, index, self.levels))

    def encode_lloyd(self, delta: torch.Tensor) -> Encoded:
        """Levels of least squared error (Lloyd 1982, Max 1960), from equal counts on."""
        magnitudes = self._magnitudes(delta)
        table = _lloyd(magnitudes, self.levels)
        index = torch.searchsorted(_midpoints(table), magnitudes)
        return self._store(delta, index, table)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """Signed levels, float32 of `shape`."""
        rows, columns = rows_and_columns(shape)
        plus, index = self.split(parts, shape)
        table = scales.load(dict(parts), self.table_format, "table").expand(rows, self.levels)
        level = table.gather(1, index) if columns else torch.zeros(rows, 0)
        return torch.where(plus, level, -level).reshape(shape)

    def split(self, parts: Parts, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """bool `[N, M]`, True is plus, and int64 `[N, M]` indexes."""
        _, columns = rows_and_columns(shape)
        codes = packing.unpack(parts["codes"], self.bits, columns)
        return (codes & 1).bool(), (codes >> 1).to(torch.int64)

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        rows, columns = rows_and_columns(shape)
        width = packing.packed_width(columns, self.bits)
        tables = (1 if self.scale == "tensor" else rows, self.levels)
        return {
            "codes": PartSpec(torch.uint8, (rows, width)),
            **scales.specs(tables, self.table_format, "table"),
        }

    def _magnitudes(self, delta: torch.Tensor) -> torch.Tensor:
        rows, columns = rows_and_columns(tuple(delta.shape))
        tables = (1, rows * columns) if self.scale == "tensor" else (rows, columns)
        return delta.abs().reshape(tables)

    def _store(self, delta: torch.Tensor, index: torch.Tensor, table: torch.Tensor) -> Encoded:
        matrix = rows_and_columns(tuple(delta.shape))
        plus = (delta >= 0).reshape(matrix).to(torch.uint8)
        codes = (index.reshape(matrix).to(torch.uint8) << 1) | plus
        return Encoded(
            self,
            {
                "codes": packing.pack(codes, self.bits),
                **scales.store(table, self.table_format, "table"),
            },
        )


def _blocks(magnitudes: torch.Tensor, levels: int) -> torch.Tensor:
    """Block of each entry of `[tables, count]`, int64; equal magnitudes share a block."""
    count = magnitudes.shape[1]
    if count == 0 or levels == 1:
        return torch.zeros_like(magnitudes, dtype=torch.int64)
    starts = [-(-j * count // levels) for j in range(1, levels)]
    starts = [min(start, count - 1) for start in starts]
    if magnitudes.is_cpu:
        ranked = np.partition(magnitudes.numpy(), sorted(set(starts)), axis=1)
        edges = torch.from_numpy(np.ascontiguousarray(ranked[:, starts]))
    else:
        places = torch.tensor(starts).to(magnitudes.device)
        edges = magnitudes.sort(dim=1).values.index_select(1, places)
    return torch.searchsorted(edges, magnitudes, right=True)


def _means(magnitudes: torch.Tensor, index: torch.Tensor, levels: int) -> torch.Tensor:
    """Mean of each block, float32 `[tables, levels]`; an empty block has the level below it."""
    tables = magnitudes.shape[0]
    if not magnitudes.is_cpu:
        return _means_there(magnitudes, index, levels)
    place = (index + torch.arange(tables).unsqueeze(1) * levels).reshape(-1).numpy()
    size = tables * levels
    # Summed in float64, entry after entry.
    sums = np.bincount(place, weights=magnitudes.reshape(-1).numpy(), minlength=size)
    counts = np.bincount(place, minlength=size)
    means = (sums / np.maximum(counts, 1)).reshape(tables, levels)
    return torch.from_numpy(np.maximum.accumulate(means, axis=1)).to(torch.float32)


def _means_there(magnitudes: torch.Tensor, index: torch.Tensor, levels: int) -> torch.Tensor:
    """The same on a device: level by level, since adding up by index there has no order."""
    found = []
    for level in range(levels):
        here = index == level
        total = torch.where(here, magnitudes, 0.0).sum(dim=1, dtype=torch.float64)
        found.append(total / here.sum(dim=1).clamp_min(1))
    return torch.stack(found, dim=1).cummax(dim=1).values.to(torch.float32)


def _midpoints(table: torch.Tensor) -> torch.Tensor:
    return ((table[:, 1:] + table[:, :-1]) / 2).contiguous()


def _lloyd(magnitudes: torch.Tensor, levels: int) -> torch.Tensor:
    table = _means(magnitudes, _blocks(magnitudes, levels), levels)
    tables, count = magnitudes.shape
    if count == 0 or levels == 1:
        return table
    ranked = magnitudes.sort(dim=1).values
    sums = torch.nn.functional.pad(ranked.cumsum(dim=1, dtype=torch.float64), (1, 0))
    ends = torch.zeros(tables, 1, dtype=torch.int64), torch.full((tables, 1), count)
    last = None
    for _ in range(_ROUNDS):
        edges = torch.cat([ends[0], torch.searchsorted(ranked, _midpoints(table)), ends[1]], dim=1)
        if last is not None and torch.equal(edges, last):
            break
        sizes = edges.diff(dim=1)
        means = sums.gather(1, edges).diff(dim=1) / sizes.clamp_min(1)
        table = torch.where(sizes > 0, means.to(torch.float32), table)
        last = edges
    return table
