"""Codes of a few bits with a scale (and a zero) for each group of a row: `v ~ (q - z) * s`.

What several terms share. The zero is one of the levels, so that what is zero stays zero. Symmetric
grids have z in the middle and scales that may be negative; the others have an integer z of their own
for each group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from deltafold.compress import bits as packing
from deltafold.compress.terms import scales
from deltafold.compress.terms.base import Parts, PartSpec


class Scales(NamedTuple):
    """Step and zero of each group of a matrix `[R, L]`.

    Attributes:
        step: float32 `[R, G]`.
        zero: uint8 `[R, G]`.
    """

    step: torch.Tensor
    zero: torch.Tensor


class Coded(NamedTuple):
    """A coded matrix: uint8 `[R, L]` codes and their scales."""

    codes: torch.Tensor
    scales: Scales


@dataclass(frozen=True)
class Grid:
    """How a matrix `[R, L]` is coded along its rows.

    Attributes:
        bits: of a code, 2 to 8.
        group: columns that share a scale; 0 is the whole row.
        symmetric: zero in the middle, nothing stored for it.
        scale_format: see `scales`.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    scale_format: str = "float16"

    def width(self, length: int) -> int:
        """Columns of a group; never wider than the row, which must not be padded to 10**9."""
        return min(self.group or length, max(length, 1)) or 1

    def groups(self, length: int) -> int:
        """G."""
        return -(-length // self.width(length)) if length else 0

    def fit(self, values: torch.Tensor) -> Scales:
        """The scales with the least squared error among shrunken ranges, rounded as stored."""
        groups = self._grouped(values)
        if groups.numel() == 0:
            empty = groups.new_zeros(groups.shape[:2])
            return Scales(empty, self._middle(empty))
        found = self._candidate(groups, 1.0)
        least = self._loss(groups, found)
        for share in _shares(self.bits):
            tried = self._candidate(groups, share)
            loss = self._loss(groups, tried)
            better = loss < least
            least = torch.where(better, loss, least)
            found = Scales(*(torch.where(better, t, f) for t, f in zip(tried, found, strict=True)))
        return self.rounded(found)

    def rounded(self, found: Scales) -> Scales:
        """What a reader will see of these scales."""
        stored = scales.store(found.step, self.scale_format, "x")
        return Scales(scales.load(stored, self.scale_format, "x"), found.zero)

    def quantise(self, values: torch.Tensor, found: Scales) -> Coded:
        """The nearest codes; values float32 `[R, L]`."""
        length = values.shape[1]
        codes = self._nearest(self._grouped(values), found).to(torch.uint8)
        codes = codes.reshape(values.shape[0], codes.shape[1] * codes.shape[2])
        return Coded(codes[:, :length].contiguous(), found)

    def code(self, values: torch.Tensor) -> Coded:
        """Fitted and quantised in one."""
        return self.quantise(values, self.fit(values))

    def values(self, coded: Coded) -> torch.Tensor:
        """float32 `[R, L]`."""
        length = coded.codes.shape[1]
        step, zero = self.spread(coded.scales, length)
        return (coded.codes.to(torch.float32) - zero) * step

    def spread(self, found: Scales, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps and zeros as float32 `[R, L]`."""
        width = self.width(length)
        step, zero = (
            part.to(torch.float32).repeat_interleave(width, dim=1)[:, :length] for part in found
        )
        return step, zero

    def store_scales(self, found: Scales, key: str) -> dict[str, torch.Tensor]:
        """Parts `<key>scales`, `<key>scales_unit` and, where not symmetric, `<key>zeros`."""
        parts = scales.store(found.step, self.scale_format, f"{key}scales")
        if not self.symmetric:
            parts[f"{key}zeros"] = packing.pack(found.zero.contiguous(), self.bits)
        return parts

    def load_scales(self, parts: Parts, key: str, length: int) -> Scales:
        """Undo `store_scales` for rows of `length`."""
        step = scales.load(dict(parts), self.scale_format, f"{key}scales")
        if self.symmetric:
            return Scales(step, self._middle(step))
        zero = packing.unpack(parts[f"{key}zeros"], self.bits, self.groups(length))
        return Scales(step, zero)

    def specs(self, rows: int, length: int, key: str) -> dict[str, PartSpec]:
        """What `store_scales` writes."""
        groups = self.groups(length)
        found = scales.specs((rows, groups), self.scale_format, f"{key}scales")
        if not self.symmetric:
            width = packing.packed_width(groups, self.bits)
            found[f"{key}zeros"] = PartSpec(torch.uint8, (rows, width))
        return found

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        rows, length = values.shape
        width, groups = self.width(length), self.groups(length)
        padded = torch.nn.functional.pad(values, (0, groups * width - length))
        return padded.reshape(rows, groups, width)

    def _middle(self, like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, 2 ** (self.bits - 1), dtype=torch.uint8)

    def _candidate(self, groups: torch.Tensor, share: float) -> Scales:
        if self.symmetric:
            # One more level lies below zero than above: the largest entry goes to that side.
            peak = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
            step = peak * (-share / 2 ** (self.bits - 1))
            return Scales(step, self._middle(step))
        most = 2**self.bits - 1
        low, high = groups.amin(dim=-1).clamp_max(0), groups.amax(dim=-1).clamp_min(0)
        step = (high - low) * (share / most)
        zero = torch.round(-low * share / _safe(step)).clamp(0, most)
        return Scales(step, zero.to(torch.uint8))

    def _nearest(self, groups: torch.Tensor, found: Scales) -> torch.Tensor:
        step, zero = (part.to(torch.float32).unsqueeze(-1) for part in found)
        return (torch.round(groups / _safe(step)) + zero).clamp(0, 2**self.bits - 1)

    def _loss(self, groups: torch.Tensor, found: Scales) -> torch.Tensor:
        step, zero = (part.to(torch.float32).unsqueeze(-1) for part in found)
        return ((self._nearest(groups, found) - zero) * step - groups).square().sum(dim=-1)


def _shares(bits: int) -> tuple[float, ...]:
    """Shares of the full range that are tried as the grid's end. Low-bit grids clip hard."""
    if bits <= 3:
        return (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    return (0.95, 0.9, 0.85, 0.8, 0.7) if bits <= 5 else ()


def _safe(step: torch.Tensor) -> torch.Tensor:
    return torch.where(step == 0, torch.ones_like(step), step)
