"""Sparse deltas of all variants of a batch in one launch, lanes across neighbouring output rows.

Two layouts. *Lists*: the entries of 32 rows, filled up to the longest of them; entry i of the 32 rows
lies together, as 16-bit columns and float16 values. *Strata* (one entry of every `of` columns, `of` up
to 16, codes up to 4 bits): one byte an entry, the place in its low half and the code in its high half;
no columns and no lengths are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
import triton
import triton.language as tl

from deltafold.compress import bits as packing
from deltafold.compress.terms import NM
from deltafold.compress.terms.base import Parts
from deltafold.runtime.kernels.triton.launch import on
from deltafold.runtime.kernels.triton.parts import chosen, first_blocks, outputs, part_of
from deltafold.runtime.kernels.triton.scatter import scattered
from deltafold.runtime.kernels.triton.segments import Segments, one_segment
from deltafold.runtime.kernels.triton.table import ByPart, Packed

#: Rows that lie together, and entries of each that are read in one step.
BLOCK: Final = 32
_STEP: Final = 32
#: Above this many tokens a variant, a dense product of the rebuilt matrix is the cheaper one.
REBUILD_ABOVE: Final = 32
_MOST_COLUMNS: Final = 2**16


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A sparse delta in GPU memory.

    Attributes:
        places: int16 `[entries, 32]`, columns as unsigned numbers; for strata uint8, place and code.
        values: float16 `[entries, 32]`; None for strata.
        starts: int32 `[blocks + 1]`, first entry of each block of rows.
        levels: float32 `[blocks * 32]`, what a row's values or codes are times.
        rows: N.
        columns: M.
        of: columns of a stratum; 0 for lists.
        half: the code that means zero; 0 for lists.
    """

    places: torch.Tensor
    values: torch.Tensor | None
    starts: torch.Tensor
    levels: torch.Tensor
    rows: int
    columns: int
    of: int = 0
    half: int = 0

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        held = (self.places, self.values, self.starts, self.levels)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """N and M."""
        return self.rows, self.columns

    @property
    def layout(self) -> tuple[int, int]:
        """What forms must share to be multiplied in one launch."""
        return self.of, self.half

    @cached_property
    def _table(self) -> SparseTable:
        return make_sparse_table([[[(self, 1.0)]]], self.places.device)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`."""
        if len(x) > REBUILD_ABOVE:
            return torch.nn.functional.linear(x, self.dense(x.dtype))
        y = x.new_zeros(len(x), self.rows)
        add_sparse([y], x.contiguous(), self._table, one_segment(len(x), x.device))
        return y

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Not for tables: the layout has no cheap rows."""
        raise AssertionError("sparse rows are made for products only")

    def dense(self, dtype: torch.dtype, base: torch.Tensor | None = None) -> torch.Tensor:
        """D, or `base + D`, as `[N, M]`."""
        held = (self.places, self.values, self.starts, self.levels)
        return scattered(*held, self.shape, self.layout, dtype, base)


def sparse_rows(delta: torch.Tensor, device: torch.device) -> SparseRows | None:
    """Entries of a float32 `[N, M]` delta that are not zero, as lists; None where it is too wide."""
    rows, columns = delta.shape
    if columns > _MOST_COLUMNS or not delta.numel():
        return None
    there = delta.to(device)
    found = torch.nn.functional.pad(there != 0, (0, 0, 0, -rows % BLOCK))
    row, column = found.nonzero(as_tuple=True)
    lengths = found.sum(dim=1)
    longest = lengths.reshape(-1, BLOCK).amax(dim=1)
    starts = torch.nn.functional.pad(longest.cumsum(0), (1, 0))
    # Entry i of a row lies at its block's start + i.
    within = torch.arange(len(row), device=device) - (lengths.cumsum(0) - lengths)[row]
    at = (starts[row // BLOCK] + within) * BLOCK + row % BLOCK
    unit = there.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    total = int(starts[-1])
    places = torch.zeros(total * BLOCK, dtype=torch.int16, device=device)
    values = torch.zeros(total * BLOCK, dtype=torch.float16, device=device)
    places[at] = column.to(torch.int16)
    values[at] = (there[row, column] / unit).to(torch.float16)
    return SparseRows(
        places=places.reshape(total, BLOCK),
        values=values.reshape(total, BLOCK),
        starts=starts.to(torch.int32),
        levels=unit.expand(len(found)).contiguous(),
        rows=rows,
        columns=columns,
    )


def strata(
    term: NM, parts: Parts, shape: tuple[int, int], device: torch.device, name: str
) -> SparseRows | None:
    """One entry of every few columns, or None where a byte does not hold it."""
    rows, columns = shape
    if term.keep != 1 or term.of > 16 or term.bits > 4 or term.group or not rows * columns:
        return None
    count = term.kept(columns)
    # Checks that the places lie within their strata.
    term.columns(parts, shape, name)
    place = packing.unpack(parts["positions"], term.position_bits, count)
    code = packing.unpack(parts["codes"], term.bits, count)
    half = 2 ** (term.bits - 1)
    filled = torch.nn.functional.pad((code << 4) | place, (0, 0, 0, -rows % BLOCK), value=half << 4)
    blocks = len(filled) // BLOCK
    together = filled.reshape(blocks, BLOCK, count).transpose(1, 2).reshape(-1, BLOCK)
    step = term.grid.load_scales(dict(parts), "", count).step.reshape(-1)
    return SparseRows(
        places=together.contiguous().to(device),
        values=None,
        starts=(torch.arange(blocks + 1, dtype=torch.int32) * count).to(device),
        levels=torch.nn.functional.pad(step, (0, -rows % BLOCK)).contiguous().to(device),
        rows=rows,
        columns=columns,
        of=term.of,
        half=half,
    )


@dataclass(frozen=True, eq=False)
class SparseTable:
    """Sparse forms of one layout by part and slot; the addresses stay valid only while the forms live.

    Attributes:
        counts: int32 `[parts, slots]`.
        addresses: int64 `[4, parts, slots, entries]`: places, values, starts, levels.
        factors: float32 `[parts, slots, entries]`.
        places: int32 `[2, parts + 1]`: first block of rows of each part, and its width.
        widths: rows of each part.
        layout: of all forms.
    """

    counts: torch.Tensor
    addresses: torch.Tensor
    factors: torch.Tensor
    places: torch.Tensor
    widths: tuple[int, ...]
    layout: tuple[int, int]


def make_sparse_table(by_part: ByPart[SparseRows], device: torch.device) -> SparseTable:
    """Sparse forms of each part's slots, each with a weight."""
    packed = Packed.of(by_part, columns=4)
    every = packed.each(by_part)
    layouts = {form.layout for _, _, _, form, _ in every}
    assert len(layouts) == 1, layouts
    widths = [0] * len(by_part)
    for part, slot, i, form, weight in every:
        held = (form.places, form.values, form.starts, form.levels)
        packed.put(part, slot, i, [0 if t is None else t.data_ptr() for t in held], weight)
        assert widths[part] in (0, form.rows), "forms of one part have the same rows"
        widths[part] = form.rows
    places = torch.tensor([first_blocks(widths, BLOCK), [*widths, 0]], dtype=torch.int64)
    counts, addresses, factors, (there,) = packed.sent(device, [places])
    return SparseTable(counts, addresses, factors, there, tuple(widths), next(iter(layouts)))


@triton.jit
def apply_sparse(  # type: ignore[no-untyped-def]
    x, y0, y1, y2, y3, order, tile_slot, tile_start, tile_length, scales,
    places_table, values_table, starts_table, levels_table, factors_table, counts, first_block,
    widths, slots, columns, x_stride, y0_stride, y1_stride, y2_stride, y3_stride,
    OF: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    ENTRIES: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # 32 rows of one part of the deltas of one tile's slot, token after token: the lists stay in the
    # caches.
    tile = tl.program_id(1)
    length = tl.load(tile_length + tile)
    if length <= 0:
        return
    part = part_of(tl.program_id(0), first_block, PARTS)
    block = tl.program_id(0) - tl.load(first_block + part)
    rows = tl.load(widths + part)
    y = chosen(part, y0, y1, y2, y3, PARTS)
    y_stride = chosen(part, y0_stride, y1_stride, y2_stride, y3_stride, PARTS)
    slot = part * slots + tl.load(tile_slot + tile)
    start = tl.load(tile_start + tile)
    lane = tl.arange(0, BLOCK)
    n = block * BLOCK + lane
    i = tl.arange(0, STEP)
    count = tl.load(counts + slot)
    done = tile * 0
    while done < length:
        token = tl.load(order + start + done).to(tl.int64)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for entry in range(ENTRIES):
            if entry < count:
                at = slot * ENTRIES + entry
                starts = tl.load(starts_table + at).to(tl.pointer_type(tl.int32)) + block
                first = tl.load(starts)
                last = tl.load(starts + 1)
                level = tl.load(tl.load(levels_table + at).to(tl.pointer_type(tl.float32)) + n)
                if OF > 0:
                    places = tl.load(places_table + at).to(tl.pointer_type(tl.uint8))
                    values = places
                else:
                    places = tl.load(places_table + at).to(tl.pointer_type(tl.int16))
                    values = tl.load(values_table + at).to(tl.pointer_type(tl.float16))
                sums = tl.zeros((STEP, BLOCK), dtype=tl.float32)
                begin = first
                while begin < last:
                    some = (begin + i < last)[:, None] & (lane >= 0)[None, :]
                    where = (begin + i).to(tl.int64)[:, None] * BLOCK + lane[None, :]
                    raw = tl.load(tl.multiple_of(places, 16) + where, mask=some, other=0)
                    if OF > 0:
                        column = (begin - first + i)[:, None] * OF + (raw.to(tl.int32) & 15)
                        number = ((raw.to(tl.int32) >> 4) - HALF).to(tl.float32)
                    else:
                        column = raw.to(tl.int32) & 0xFFFF
                        number = tl.load(
                            tl.multiple_of(values, 16) + where, mask=some, other=0.0
                        ).to(tl.float32)
                    some = some & (column < columns)
                    taken = tl.load(x + token * x_stride + column, mask=some, other=0.0)
                    sums += number * taken.to(tl.float32)
                    begin += STEP
                total += tl.sum(sums, axis=0) * level * tl.load(factors_table + at)
        if SCALED:
            total *= tl.load(scales + token)
        kept = n < rows
        target = y + token * y_stride + n
        known = tl.load(target, mask=kept, other=0.0)
        tl.store(target, (known.to(tl.float32) + total).to(known.dtype), mask=kept)
        done += 1


def add_sparse(
    ys: Sequence[torch.Tensor], x: torch.Tensor, table: SparseTable, segments: Segments
) -> None:
    """`y_p[t] += s[t] * sum_i factor_i x[t] D_pi^T` over the sparse forms of part p, token t's slot.

    Args:
        ys: an output `[T, N_p]` for each part, changed in place; tokens of the base are not touched.
        x: `[T, M]`.
        table: the forms by part and slot.
        segments: which slot each token has.
    """
    assert x.stride(1) == 1, "rows must be contiguous"
    blocks = first_blocks(table.widths, BLOCK)[-1]
    if not segments.tiles or not blocks:
        return
    scaled = segments.scales is not None
    of, half = table.layout
    held, strides = outputs(ys)
    with on(x.device):
        apply_sparse[(blocks, segments.tiles)](
            x, *held, segments.order, segments.slot, segments.start, segments.length,
            segments.scales if scaled else segments.order,
            *table.addresses.unbind(0), table.factors, table.counts, *table.places.unbind(0),
            table.counts.shape[1], x.shape[1], x.stride(0), *strides,
            OF=of, HALF=half, BLOCK=BLOCK, STEP=_STEP, ENTRIES=table.factors.shape[2],
            SCALED=scaled, PARTS=len(table.widths),
        )  # fmt: skip
