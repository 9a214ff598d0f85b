"""Square patches in the cosine domain, important ones with more bits.

After Delta-DCT (arXiv 2503.06676): a matrix is cut into patches, a patch's importance is its norm, each
share of patches by importance has a width, the coefficients of a patch are coded on a grid of its own,
and patches of no bits are their mean. The paper's default sizes and widths were not to be found.
"""

from __future__ import annotations

import itertools
import math
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


@register
@dataclass(frozen=True)
class Patches(Checked):
    """Orthonormal DCT-II of patches of `h x w`: `h = min(size, N)`, `w = min(size, M)`.

    The matrix is filled up with zeros to whole patches, P in all, in row-major order. Parts: `classes`
    uint8, one row of codes for P patches (only where there are several widths); for class i with c
    patches in order, `{i}.codes` uint8 `[c, ceil(h * w * width / 8)]`, `{i}.scales` float16 `[c, 1]`,
    `{i}.scales_unit`, `{i}.zeros`; for a width of 0 `{i}.means` float16 `[c]` and `{i}.means_unit`.

    Attributes:
        size: of a patch's side.
        widths: bits of each class, 2 to 8, or 0 for the mean alone.
        shares: of the patches in each class, by falling norm; they sum to 1.
    """

    id: ClassVar[str] = "patches"
    version: ClassVar[int] = 1

    size: int = 16
    widths: tuple[int, ...] = (2, 0)
    shares: tuple[float, ...] = (0.5, 0.5)

    def __post_init__(self) -> None:
        self._require(2 <= self.size <= 256, f"size must be 2 to 256, not {self.size}")
        pairs = 0 < len(self.widths) == len(self.shares) <= 16
        self._require(pairs, "widths and shares must go in pairs, 16 at most")
        fit = all(type(w) is int and (w == 0 or 2 <= w <= 8) for w in self.widths)
        self._require(fit, "widths must be 2 to 8, or 0")
        numbers = all(type(s) in (int, float) and s >= 0 for s in self.shares)
        self._require(numbers, "shares must be numbers, not negative")
        self._require(math.isclose(sum(self.shares), 1, abs_tol=1e-6), "shares must sum to 1")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Patches of a float32 delta."""
        height, width, patches = self.layout(tuple(delta.shape))
        cut = self._cut(delta, height, width)
        norms = cut.square().sum(dim=(1, 2), dtype=torch.float64)
        order = norms.argsort(descending=True, stable=True)
        spectrum = (basis(height) @ cut @ basis(width).T).reshape(patches, height * width)
        classes = torch.zeros(patches, dtype=torch.uint8)
        parts: dict[str, torch.Tensor] = {}
        start = 0
        for i, (bits, count) in enumerate(zip(self.widths, self.counts(patches), strict=True)):
            chosen = order[start : start + count].sort().values
            start += count
            classes[chosen] = i
            if bits:
                coded = self.grid(bits).code(spectrum[chosen])
                parts[f"{i}.codes"] = packing.pack(coded.codes, bits)
                parts |= self.grid(bits).store_scales(coded.scales, f"{i}.")
            else:
                means = cut[chosen].mean(dim=(1, 2)) if cut.numel() else torch.zeros(count)
                parts |= scales.store(means, "float16", f"{i}.means")
        if len(self.widths) > 1:
            parts["classes"] = packing.pack(classes, self._class_bits)
        return Encoded(self, parts)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The inverse transform, float32 of `shape`."""
        height, width, patches = self.layout(shape)
        classes = torch.zeros(patches, dtype=torch.uint8)
        if len(self.widths) > 1:
            classes = packing.unpack(parts["classes"], self._class_bits, patches)
        out = torch.zeros(patches, height, width)
        for i, (bits, count) in enumerate(zip(self.widths, self.counts(patches), strict=True)):
            chosen = (classes == i).nonzero().reshape(-1)
            if len(chosen) != count:
                raise DeltafoldError(
                    "bad-manifest", f"{context.name}: a class has another number of patches."
                )
            if bits:
                codes = packing.unpack(parts[f"{i}.codes"], bits, height * width)
                found = self.grid(bits).load_scales(parts, f"{i}.", height * width)
                values = self.grid(bits).values(Coded(codes, found))
                spectrum = values.reshape(count, height, width)
                out[chosen] = basis(height).T @ spectrum @ basis(width)
            else:
                means = scales.load(dict(parts), "float16", f"{i}.means")
                out[chosen] = means.reshape(count, 1, 1).expand(count, height, width)
        return self._paste(out, shape)

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        height, width, patches = self.layout(shape)
        specs: dict[str, PartSpec] = {}
        if len(self.widths) > 1:
            packed = packing.packed_width(patches, self._class_bits)
            specs["classes"] = PartSpec(torch.uint8, (packed,))
        for i, (bits, count) in enumerate(zip(self.widths, self.counts(patches), strict=True)):
            if bits:
                packed = packing.packed_width(height * width, bits)
                specs[f"{i}.codes"] = PartSpec(torch.uint8, (count, packed))
                specs |= self.grid(bits).specs(count, height * width, f"{i}.")
            else:
                specs |= scales.specs((count,), "float16", f"{i}.means")
        return specs

    def layout(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Height and width of a patch, and P."""
        rows, columns = rows_and_columns(shape)
        height, width = max(min(self.size, rows), 1), max(min(self.size, columns), 1)
        return height, width, -(-rows // height) * -(-columns // width)

    def counts(self, patches: int) -> list[int]:
        """Patches of each class: P times the share, rounded so that they sum to P."""
        ends, total = [0], 0.0
        for share in self.shares[:-1]:
            total += share
            ends.append(min(math.floor(total * patches + 0.5), patches))
        ends.append(patches)
        return [after - before for before, after in itertools.pairwise(ends)]

    def grid(self, bits: int) -> Grid:
        """How the coefficients of one patch, in row-major order, are coded."""
        return Grid(bits, group=0, symmetric=False)

    @property
    def _class_bits(self) -> int:
        return (len(self.widths) - 1).bit_length()

    def _cut(self, delta: torch.Tensor, height: int, width: int) -> torch.Tensor:
        rows, columns = rows_and_columns(tuple(delta.shape))
        down, across = -(-rows // height), -(-columns // width)
        filling = (0, across * width - columns, 0, down * height - rows)
        padded = torch.nn.functional.pad(delta.reshape(rows, columns), filling)
        cut = padded.reshape(down, height, across, width).transpose(1, 2)
        return cut.reshape(down * across, height, width)

    def _paste(self, cut: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        rows, columns = rows_and_columns(shape)
        _, height, width = cut.shape
        down, across = -(-rows // height), -(-columns // width)
        whole = cut.reshape(down, across, height, width).transpose(1, 2)
        whole = whole.reshape(down * height, across * width)
        return whole[:rows, :columns].reshape(shape)


def basis(size: int) -> torch.Tensor:
    """The orthonormal DCT-II, float32 `[size, size]`; row k is the k-th frequency."""
    k = torch.arange(size, dtype=torch.float64).unsqueeze(1)
    t = torch.arange(size, dtype=torch.float64).unsqueeze(0)
    rows = torch.cos(math.pi * (2 * t + 1) * k / (2 * size)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows.to(torch.float32)
