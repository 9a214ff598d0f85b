"""The CPU's portable fast form: torch's int4 product, which carries any code of 1 to 4 bits.

`aten::_weight_int4pack_mm_for_cpu` multiplies by `(q - 8) * s + z` with q of 4 bits and (s, z) a group
of columns, reading half a byte a weight where a dense bfloat16 copy reads two. A sign plane is q in
{9, 7} with z = 0; codes of 2 to 4 bits are q shifted to the middle; codes of 5 to 8 bits are two
passes, 16 * high + low. It is vectorised for bfloat16 activations; float32 models use dense deltas
instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from deltafold.compress.terms import Codes, Planes
from deltafold.compress.terms.base import Parts

_GROUPS: Final = (256, 128, 64, 32)
_ROWS: Final = 16


@dataclass(frozen=True)
class Int4:
    """Packed 4-bit codes.

    Attributes:
        packed: uint8, as torch lays them out for this machine.
        scales: bfloat16 `[M / group, N, 2]`, scale and zero.
        group: columns that share a scale.
        rows: N; the packed form is padded to a multiple of 16.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    group: int
    rows: int

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.packed.numel() + self.scales.numel() * self.scales.element_size()

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`; x bfloat16 `[k, M]`."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.group, self.scales
        )
        return y[:, : self.rows]

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Not for tables: the packed layout has no cheap rows."""
        raise AssertionError("int4 forms are made for products only")


def planes_forms(term: Planes, parts: Parts, shape: tuple[int, ...]) -> list[Int4] | None:
    """One form a plane, or None where the shape or group does not fit the op."""
    rows, columns = shape
    group = _group(columns, term.group if term.scale == "group" else 0)
    if group is None:
        return None
    forms = []
    for (plus, _), level in zip(term.planes(parts, shape), term.levels(parts), strict=True):
        codes = torch.where(plus, 9, 7).to(torch.int32)
        forms.append(_pack(codes, _per_group(level, rows, columns, group), group))
    return forms


def codes_forms(term: Codes, parts: Parts, shape: tuple[int, ...]) -> list[Int4] | None:
    """One form (two above 4 bits), or None where the shape or group does not fit the op."""
    rows, columns = shape
    group = _group(columns, term.group)
    if group is None:
        return None
    codes, scale = term.grid(parts, shape)
    step = term.group or columns
    levels = _per_group(scale[:, ::step] if scale.shape[1] > 1 else scale, rows, columns, group)
    if term.bits <= 4:
        return [_pack(codes.to(torch.int32) + 8, levels, group)]
    # q in [-128, 127] is 16 * high + low with high in [-8, 7] and low in [0, 15]; low's zero point
    # moves by 8, which the op's z undoes.
    wide = codes.to(torch.int32) + 128
    high, low = wide >> 4, wide & 15
    return [_pack(high, levels * 16, group), _pack(low, levels, group, zero=levels * 8)]


def _group(columns: int, group: int) -> int | None:
    if group and columns % group:
        return None  # the last group is shorter than the others
    for candidate in _GROUPS:
        if columns % candidate == 0 and (not group or group % candidate == 0):
            return candidate
    return None


def _per_group(level: torch.Tensor, rows: int, columns: int, group: int) -> torch.Tensor:
    """Levels `[]`, `[N]` or `[N, groups]` as float32 `[N, columns / group]`."""
    if level.dim() == 0:
        level = level.expand(rows)
    if level.dim() == 1:
        level = level.unsqueeze(1)
    return level.repeat_interleave(columns // group // level.shape[1], dim=1)


def _pack(
    codes: torch.Tensor, levels: torch.Tensor, group: int, zero: torch.Tensor | None = None
) -> Int4:
    rows = codes.shape[0]
    padding = -rows % _ROWS
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padding), value=8)
    scales = torch.stack([levels, torch.zeros_like(levels) if zero is None else zero], dim=-1)
    scales = torch.nn.functional.pad(scales, (0, 0, 0, 0, 0, padding))
    return Int4(
        packed=torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1),
        scales=scales.transpose(0, 1).to(torch.bfloat16).contiguous(),
        group=group,
        rows=rows,
    )
