"""Low rank with coded factors, in bands of singular vectors of different widths.

`D ~ sum over bands of b_i^T a_i`, the factors coded vector by vector: a few leading vectors with many
bits, the long tail with few. After Delta-CoMe (arXiv 2406.08903, section 3.2: 8, 3 and 2 bits); with a
band for each width it also holds one width a vector. Entries of the factors may be dropped by a
seeded mask (after ImPart, arXiv 2504.13237), which then costs only a count a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from deltafold.compress import bits as packing
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.philox import choose
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
from deltafold.compress.terms.lowrank import truncated_svd

#: The width that stands for plain float16 values.
HALF = 16


class Band(NamedTuple):
    """Vectors `first` to `last` (exclusive) in singular order, and their width in bits."""

    first: int
    last: int
    width: int


@register
@dataclass(frozen=True)
class Banded(Checked):
    """Coded factors `a [r, M]` and `b [r, N]`; `D = b^T a`.

    Parts of band i, for f in `a` (length M) and `b` (length N): `f{i}.codes` uint8, the kept entries
    in memory order as one row of codes; `f{i}.scales` `[rank, G]`, `f{i}.scales_unit` and, unless
    symmetric, `f{i}.zeros`. A band of 16 bits has `f{i}.values` and `f{i}.values_unit` instead. With
    `masked` also `kept` int32 `[2, r]`: entries kept of each vector of a, and of b.

    Attributes:
        ranks: vectors of each band; trailing ones that the shape has no room for are left out.
        widths: bits of each band's codes, 2 to 8, or 16 for float16 values.
        group: entries of a vector that share a scale; 0 is the whole vector.
        symmetric: grids without a zero of their own.
        scale_format: "float32" or "float16".
        masked: whether entries are dropped.
        seed: of the mask.
        counts: kept entries of a and b of each band, in the order a0, b0, a1, ...; filled in by
            encode where masked.
    """

    id: ClassVar[str] = "banded"
    version: ClassVar[int] = 1

    ranks: tuple[int, ...] = (2, 32, 96)
    widths: tuple[int, ...] = (8, 3, 2)
    group: int = 128
    symmetric: bool = False
    scale_format: str = "float16"
    masked: bool = False
    seed: int = 0
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        whole = all(type(n) is int for n in (*self.ranks, *self.widths, *self.counts))
        self._require(whole, "ranks, widths and counts must be whole numbers")
        self._require(0 < len(self.ranks) == len(self.widths), "ranks and widths must go in pairs")
        self._require(min(self.ranks) >= 1, "ranks must be at least 1")
        fit = all(2 <= w <= 8 or w == HALF for w in self.widths)
        self._require(fit, "widths must be 2 to 8, or 16")
        self._require(self.group >= 0, "group must not be negative")
        self._require(self.scale_format in scales.FORMATS, "scale_format: float32 or float16")
        self._require(0 <= self.seed < 2**64, "seed must fit 64 unsigned bits")
        self._require(self.masked or not self.counts, "counts go with masked")
        self._require(all(n >= 0 for n in self.counts), "counts must not be negative")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """The leading singular vectors of a float32 delta, sqrt(S) in each factor."""
        matrix = delta.reshape(rows_and_columns(tuple(delta.shape)))
        left, singular, right = truncated_svd(matrix, self.rank(tuple(delta.shape)))
        root = singular.sqrt().unsqueeze(1)
        return self.from_factors(root * right, root * left.T, context)

    def from_factors(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        context: Context,
        kept: torch.Tensor | None = None,
    ) -> Encoded:
        """Code given factors, float32 `a [r, M]` and `b [r, N]`, r as `rank` says.

        `kept` int32 `[2, r]` (all entries if left out) counts where `masked`; what a mask drops is not
        read, and what it keeps must hold the rescaling already.
        """
        shape = (b.shape[1], a.shape[1])
        coded = []
        for band in self.bands(shape):
            for factor in (a, b):
                values = factor[band.first : band.last]
                coded.append(values if band.width == HALF else self.grid(band.width).code(values))
        return self.assemble(coded, shape, context, kept)

    def assemble(
        self,
        coded: list[torch.Tensor | Coded],
        shape: tuple[int, int],
        context: Context,
        kept: torch.Tensor | None = None,
    ) -> Encoded:
        """Parts from factors that somebody else coded on `grid(width)`: a0, b0, a1, b1, ...

        A band of 16 bits is given as float32 values. `shape` is (N, M); `kept` as above.
        """
        parts: dict[str, torch.Tensor] = {}
        if self.masked and kept is None:
            lengths = torch.tensor([[shape[1]], [shape[0]]], dtype=torch.int32)
            kept = lengths.expand(2, self.rank(shape)).contiguous()
        masks = self._masks(kept, shape, context.name)
        counts = []
        pairs = zip(coded[::2], coded[1::2], strict=True)
        for i, (band, pair) in enumerate(zip(self.bands(shape), pairs, strict=True)):
            for factor, item, mask in zip("ab", pair, masks, strict=True):
                chosen = None if mask is None else mask[band.first : band.last]
                counts.append(self._store(item, chosen, band.width, f"{factor}{i}.", parts))
        if kept is None:
            return Encoded(self, parts)
        parts["kept"] = kept.to(torch.int32).contiguous()
        return Encoded(replace(self, counts=tuple(counts)), parts)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """`b^T a`, float32 of `shape`."""
        a, b = self.factors(parts, shape, context)
        return (b @ a).reshape(shape)

    def factors(
        self, parts: Parts, shape: tuple[int, ...], context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 `a [r, M]` and `b [N, r]`, the form that LoRA servers apply."""
        matrix = rows_and_columns(shape)
        masks = self._masks(parts.get("kept"), matrix, context.name)
        rows: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
        for i, band in enumerate(self.bands(shape)):
            for factor, length, mask in zip("ab", reversed(matrix), masks, strict=True):
                chosen = None if mask is None else mask[band.first : band.last]
                key = f"{factor}{i}."
                rows[factor].append(self._load(parts, band, length, chosen, key, context.name))
        return torch.cat(rows["a"]), torch.cat(rows["b"]).T.contiguous()

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part; before encoding nothing is taken as dropped."""
        matrix = rows_and_columns(shape)
        specs: dict[str, PartSpec] = {}
        bands = self.bands(shape)
        counts = iter(self.counts if len(self.counts) == 2 * len(bands) else ())
        for i, (first, last, width) in enumerate(bands):
            rank = last - first
            for factor, length in zip("ab", reversed(matrix), strict=True):
                count, key = next(counts, rank * length), f"{factor}{i}."
                if width == HALF:
                    specs |= scales.specs((count,), "float16", f"{key}values")
                    continue
                packed = packing.packed_width(count, width)
                specs[f"{key}codes"] = PartSpec(torch.uint8, (packed,))
                specs |= self.grid(width).specs(rank, length, key)
        if self.masked:
            specs["kept"] = PartSpec(torch.int32, (2, self.rank(shape)))
        return specs

    def grid(self, width: int) -> Grid:
        """How a band of this width is coded, along each vector."""
        return Grid(width, self.group, self.symmetric, self.scale_format)

    def rank(self, shape: tuple[int, ...]) -> int:
        """Vectors in all that a tensor of `shape` gets."""
        return min(sum(self.ranks), max(min(rows_and_columns(shape)), 1))

    def bands(self, shape: tuple[int, ...]) -> list[Band]:
        """The bands of a tensor of `shape`."""
        rank, first = self.rank(shape), 0
        found = []
        for size, width in zip(self.ranks, self.widths, strict=True):
            last = min(first + size, rank)
            if last > first:
                found.append(Band(first, last, width))
            first = last
        return found

    def _masks(
        self, kept: torch.Tensor | None, matrix: tuple[int, ...], name: str
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which entries of a and of b are kept; None where all are."""
        if not self.masked or kept is None:
            return None, None
        a, b = (
            self._mask(counts, length, f"{name}:{factor}")
            for factor, counts, length in zip("ab", kept, reversed(matrix), strict=True)
        )
        return a, b

    def _mask(self, counts: torch.Tensor, length: int, stream: str) -> torch.Tensor:
        if counts.numel() and not (int(counts.min()) >= 0 and int(counts.max()) <= length):
            raise DeltafoldError("bad-manifest", f"{stream}: a vector cannot keep so many entries.")
        chosen = choose(counts.to(torch.int64).numpy(), length, seed=self.seed, name=stream)
        return torch.from_numpy(chosen)

    def _store(
        self,
        item: torch.Tensor | Coded,
        mask: torch.Tensor | None,
        width: int,
        key: str,
        parts: dict[str, torch.Tensor],
    ) -> int:
        """Add one factor of one band to `parts`; the number of entries kept."""
        entries = item.codes if isinstance(item, Coded) else item
        flat = entries.reshape(-1) if mask is None else entries[mask]
        if isinstance(item, Coded):
            parts[f"{key}codes"] = packing.pack(flat.contiguous(), width)
            parts |= self.grid(width).store_scales(item.scales, key)
        else:
            parts |= scales.store(flat, "float16", f"{key}values")
        return flat.numel()

    def _load(
        self,
        parts: Parts,
        band: Band,
        length: int,
        mask: torch.Tensor | None,
        key: str,
        name: str,
    ) -> torch.Tensor:
        """One factor of one band, float32 `[rank, length]`."""
        rank = band.last - band.first
        count = rank * length if mask is None else int(mask.sum())
        half = band.width == HALF
        stored = parts[f"{key}values"].numel() if half else parts[f"{key}codes"].numel()
        if stored != (count if half else packing.packed_width(count, band.width)):
            raise DeltafoldError(
                "bad-manifest", f"{name}: the mask keeps another number of entries."
            )
        if half:
            flat = scales.load(dict(parts), "float16", f"{key}values")
            return flat.reshape(rank, length) if mask is None else _scatter(flat, mask)
        grid = self.grid(band.width)
        flat = packing.unpack(parts[f"{key}codes"], band.width, count)
        found = grid.load_scales(parts, key, length)
        if mask is None:
            return grid.values(Coded(flat.reshape(rank, length), found))
        step, zero = grid.spread(found, length)
        return _scatter((flat.to(torch.float32) - zero[mask]) * step[mask], mask)


def _scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(mask.shape)
    out[mask] = values
    return out
