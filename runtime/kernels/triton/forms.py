"""Stored planes and codes as slices in GPU memory, and what one variant does with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from deltafold.compress import bits as packing
from deltafold.compress.terms import Codebook, Codes, ColumnPlanes, Planes
from deltafold.compress.terms.base import Parts
from deltafold.runtime.kernels.signs import codebook_planes
from deltafold.runtime.kernels.triton.expand import expand_slices
from deltafold.runtime.kernels.triton.launch import add_slices
from deltafold.runtime.kernels.triton.layout import Kind, Slice, group_fits, make_slice
from deltafold.runtime.kernels.triton.segments import one_segment
from deltafold.runtime.kernels.triton.table import SliceTable, make_table

#: Above this many tokens a variant, rebuilding the delta and a plain product read and compute less.
REBUILD_ABOVE = 384
#: Codebooks of more levels are more planes than a dense copy has bits to offer.
_MOST_LEVELS = 4


@dataclass(frozen=True, eq=False)
class BitSlices:
    """A delta as a sum of slices of one shape, all in GPU memory."""

    slices: tuple[Slice, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """N and M."""
        kind = self.slices[0].kind
        return kind.rows, kind.columns

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes; what slices share counts once."""
        held = {
            id(t): t.numel() * t.element_size()
            for piece in self.slices
            for t in (piece.words, piece.levels, piece.columns)
            if t is not None
        }
        return sum(held.values())

    @cached_property
    def _tables(self) -> list[SliceTable]:
        """Tables of one slot, by what can share a launch."""
        device = self.slices[0].words.device
        found: dict[Kind, list[tuple[Slice, float]]] = {}
        for piece in self.slices:
            found.setdefault(piece.kind.of_blocks, []).append((piece, 1.0))
        return [make_table(kind, [[slices]], device) for kind, slices in found.items()]

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`; x `[k, M]` float32, bfloat16 or float16."""
        if len(x) > REBUILD_ABOVE:
            return torch.nn.functional.linear(x, self.dense(x.dtype))
        y = x.new_zeros(len(x), self.shape[0])
        segments = one_segment(len(x), x.device)
        for table in self._tables:
            add_slices([y], x.contiguous(), table, segments)
        return y

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D, float32."""
        return self._expanded(index, None, torch.float32)

    def dense(self, dtype: torch.dtype, base: torch.Tensor | None = None) -> torch.Tensor:
        """D, or `base + D`, in one pass over the packed bytes: `[N, M]` of `dtype`."""
        return self._expanded(None, base, dtype)

    def _expanded(
        self, index: torch.Tensor | None, base: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        for i, table in enumerate(self._tables):
            # Sums of several kinds are rounded once, at the end.
            wide = torch.float32 if i + 1 < len(self._tables) else dtype
            base = expand_slices(table, index, base, wide, first=not i)
        assert base is not None
        return base


def bit_slices(
    term: Planes | Codes | ColumnPlanes | Codebook,
    parts: Parts,
    shape: tuple[int, int],
    device: torch.device,
) -> BitSlices | None:
    """The packed form of a term, or None where it has none (odd group widths, large codebooks)."""
    if not all(shape):
        return None
    if isinstance(term, Planes):
        found = _planes(term, parts, shape, device)
    elif isinstance(term, Codes):
        found = _codes(term, parts, shape, device)
    elif isinstance(term, ColumnPlanes):
        found = _column_planes(term, parts, shape, device)
    else:
        found = _codebook(term, parts, shape, device)
    slices = tuple(found)
    return BitSlices(slices) if slices else None


def _planes(
    term: Planes, parts: Parts, shape: tuple[int, int], device: torch.device
) -> Iterator[Slice]:
    rows, columns = shape
    group = min(term.group, columns) if term.scale == "group" else columns
    if not group_fits(columns, group):
        return
    levels = parts["scales"]
    kind = Kind(1, rows, columns, group, False, levels.dtype)
    for i in range(term.bits):
        whole = levels[i].reshape(1, -1) if term.scale != "group" else levels[i].T
        level = whole.expand(-1, rows)
        factor = float(parts["scales_unit"][i]) if "scales_unit" in parts else 1.0
        fields = unpacked(parts["signs"][i], 1, columns, device)
        yield make_slice(fields, kind, level.to(device), factor)


def _codes(
    term: Codes, parts: Parts, shape: tuple[int, int], device: torch.device
) -> Iterator[Slice]:
    """The low 2 or 4 bits, centred, and a sign for each bit above them.

    With b bits of which l are low, `q - 2**(b-1) = (low - 2**(l-1)) + sum_{i >= l} 2**(i-1) s_i`.
    """
    rows, columns = shape
    group = min(term.group or columns, columns)
    if not group_fits(columns, group):
        return
    codes = unpacked(parts["codes"], term.bits, columns, device)
    levels = parts["scales"].T.to(device)
    unit = float(parts["scales_unit"][0]) if "scales_unit" in parts else 1.0
    low = 4 if term.bits >= 4 else 2
    kind = Kind(low, rows, columns, group, False, levels.dtype)
    first = make_slice(codes & (2**low - 1), kind, levels, unit)
    yield first
    signs = Kind(1, rows, columns, group, False, levels.dtype)
    for i in range(low, term.bits):
        piece = make_slice((codes >> i) & 1, signs, levels, unit * 2.0 ** (i - 1))
        yield Slice(signs, piece.words, first.levels, piece.factor)


def _column_planes(
    term: ColumnPlanes, parts: Parts, shape: tuple[int, int], device: torch.device
) -> Iterator[Slice]:
    rows, columns = shape
    kind = Kind(1, rows, columns, columns, True, torch.float32)
    ones = torch.ones(1, rows, device=device)
    for signs, scales in zip(parts["signs"], term.levels(parts), strict=True):
        fields = unpacked(signs, 1, columns, device)
        yield make_slice(fields, kind, ones, columns=scales.to(device).contiguous())


def _codebook(
    term: Codebook, parts: Parts, shape: tuple[int, int], device: torch.device
) -> Iterator[Slice]:
    if term.levels > _MOST_LEVELS:
        return
    kind = Kind(1, *shape, shape[1], False, torch.float32)
    for plus, levels in zip(*codebook_planes(term, parts, shape), strict=True):
        yield make_slice(plus.to(device, torch.uint8), kind, levels.to(device))


def unpacked(packed: torch.Tensor, bits: int, columns: int, device: torch.device) -> torch.Tensor:
    """Packed rows as uint8 `[N, M]`, on the device; the bytes travel packed where they can."""
    if bits not in (1, 2, 4, 8):
        return packing.unpack(packed, bits, columns).to(device)
    there = packed.to(device)
    if bits == 8:
        return there[:, :columns]
    fields = [(there >> (f * bits)) & (2**bits - 1) for f in range(8 // bits)]
    return torch.stack(fields, dim=-1).flatten(1)[:, :columns]
