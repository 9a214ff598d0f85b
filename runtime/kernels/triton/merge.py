"""Prompts: tokens times base and delta added up, tile by tile in registers, all variants in one launch.

A weight is read once for each block of tokens, its packed delta is unpacked beside it, and their sum is
rounded to the model's dtype, as a merged checkpoint is. Nothing dense is written to memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
import triton
import triton.language as tl

from deltafold.runtime.kernels.base import DeltaMatrix
from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.grouped import SlotTables
from deltafold.runtime.kernels.triton.launch import compute_type, in_pairs, on
from deltafold.runtime.kernels.triton.layout import Kind
from deltafold.runtime.kernels.triton.segments import MERGED_TOKENS, Segments
from deltafold.runtime.kernels.triton.table import SliceTable
from deltafold.runtime.kernels.triton.unpack import field_values

#: Fields of a word that one step takes: with 32 words a step has 128 columns, and four weights share
#: the moving of a word to its first field.
_FIELDS: Final = 4
_WARPS, _STAGES = 8, 2


@triton.jit
def merge_slices(  # type: ignore[no-untyped-def]
    x, y, base, order, tile_slot, tile_start, tile_length,
    words_table, levels_table, factors_table, columns_table, counts,
    rows, columns, x_stride, y_stride, base_stride, group, level_stride,
    BITS: tl.constexpr, FIELDS: tl.constexpr, EACH: tl.constexpr, STEPS: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, ENTRIES: tl.constexpr,
    TILES: tl.constexpr, ONE_GROUP: tl.constexpr, BY_COLUMN: tl.constexpr,
    HALF_LEVELS: tl.constexpr, COMPUTE: tl.constexpr, PAIRS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One block of rows and up to BT tokens of one variant; blocks that run together share the rows.
    tile = tl.program_id(0)
    block = tl.program_id(1)
    length = tl.load(tile_length + tile)
    if length <= 0:
        return
    slot = tl.load(tile_slot + tile)
    place = tl.load(tile_start + tile) + tl.arange(0, BT)
    here = tl.arange(0, BT) < length
    token = tl.load(order + place, mask=here, other=0).to(tl.int64)
    n = block * BN + tl.arange(0, BN)
    w = tl.arange(0, BW)
    inputs = x + token[None, :] * x_stride
    weights = base + n.to(tl.int64)[:, None] * base_stride
    within = block.to(tl.int64) * (TILES * BN * BW) + tl.arange(0, BN)[:, None] * BW + w[None, :]
    count = tl.load(counts + slot)
    total = tl.zeros((BN, BT), dtype=tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        t = step * EACH // FIELDS
        field = step * EACH % FIELDS
        for j in tl.static_range(EACH):
            first = t * (FIELDS * BW) + (field + j) * BW
            k = first + w
            known = (n < rows)[:, None] & (k < columns)[None, :]
            merged = tl.load(weights + k[None, :], mask=known, other=0.0).to(tl.float32)
            for entry in tl.static_range(ENTRIES):
                at = slot * ENTRIES + entry
                # A slot with fewer slices than others adds nothing, and its addresses are not read.
                some = entry < count
                words = tl.load(words_table + at).to(tl.pointer_type(tl.int16))
                word = tl.load(
                    tl.multiple_of(words, 16) + within + t * (BN * BW),
                    mask=some & (n >= 0)[:, None] & (w >= 0)[None, :],
                    other=0,
                )
                if HALF_LEVELS:
                    levels = tl.load(levels_table + at).to(tl.pointer_type(tl.float16))
                else:
                    levels = tl.load(levels_table + at).to(tl.pointer_type(tl.float32))
                of_group = n
                if not ONE_GROUP:
                    g = tl.minimum(first, columns - 1) // group
                    of_group += g * level_stride
                level = tl.load(
                    tl.multiple_of(levels, 16) + of_group, mask=some & (n >= 0), other=0.0
                )
                level = level.to(tl.float32) * tl.load(factors_table + at)
                # What lies above the fields of this step may be anything: they are cut out.
                moved = (word >> (field * BITS).to(tl.int16)).to(tl.int16)
                value = field_values(moved, j, BITS, COMPUTE, PAIRS).to(tl.float32)
                value *= level[:, None]
                if BY_COLUMN:
                    by_column = tl.load(columns_table + at).to(tl.pointer_type(tl.float32))
                    by = tl.load(by_column + k, mask=some & (k < columns), other=0.0)
                    value *= by[None, :]
                merged += value
            taken = tl.load(inputs + k[:, None], mask=(k < columns)[:, None], other=0.0)
            rounded = merged.to(base.dtype.element_ty).to(COMPUTE)
            total = tl.dot(rounded, taken.to(COMPUTE), total, input_precision="ieee")
    target = y + token[None, :] * y_stride + n[:, None]
    tl.store(target, total.to(y.dtype.element_ty), mask=here[None, :] & (n < rows)[:, None])


def merged_slices(
    x: torch.Tensor, base: torch.Tensor, table: SliceTable, segments: Segments
) -> torch.Tensor:
    """`x[t] (W + sum_i factor_i D_i)^T` over the slices of token t's slot, summed in W's dtype.

    Args:
        x: `[T, M]` of W's dtype.
        base: W `[N, M]`, float32, bfloat16 or float16.
        table: the slices by slot, of one part, those of the batch's slots with W's rows; a slot
            without any has W alone.
        segments: which slot each token has, in tiles of `MERGED_TOKENS`. Tokens of no slot get
            nothing: what the result has for them is undefined.

    Returns:
        `[T, N]` of W's dtype.
    """
    kind = table.kind
    rows, columns = base.shape
    assert x.shape == (segments.tokens, columns), (x.shape, base.shape)
    assert kind.columns == columns, (kind, base.shape)
    assert table.parts == 1, table.parts
    assert table.widths[0] >= rows, (table.widths, rows)
    assert x.dtype == base.dtype, (x.dtype, base.dtype)
    assert x.stride(1) == base.stride(1) == 1, "rows must be contiguous"
    assert segments.block == MERGED_TOKENS, segments.block
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    if not segments.tiles or not rows:
        return y
    blocks = triton.cdiv(rows, kind.block_rows)
    with on(x.device):
        merge_slices[(segments.tiles, blocks)](
            x, y, base, segments.order, segments.slot, segments.start, segments.length,
            table.words, table.levels, table.factors, table.columns, table.counts,
            rows, columns, x.stride(0), y.stride(0), base.stride(0), kind.group,
            blocks * kind.block_rows,
            **merge_constants(kind, table.entries, x.dtype), num_warps=_WARPS,
        )  # fmt: skip
    return y


class MergedProducts:
    """Products of one layer by base and delta added up, for all variants of a batch."""

    def __init__(self) -> None:
        self._tables = SlotTables()

    def product(
        self,
        x: torch.Tensor,
        base: torch.Tensor,
        forms: Mapping[int, BitSlices],
        segments: Segments,
        capacity: int,
    ) -> torch.Tensor:
        """`x[t] (W + D)^T` with the form of token t's slot, `[T, N]`.

        Args:
            x: `[T, M]` of W's dtype.
            base: W `[N, M]`.
            forms: every slot of the batch with its variant's form, which `merge_together`.
            segments: which slot each token has, in tiles of `MERGED_TOKENS`.
            capacity: how many slots there are.
        """
        by_slot = {slot: (form,) for slot, form in forms.items()}
        ((_, table),) = self._tables.used(by_slot, capacity, x.device)
        assert isinstance(table, SliceTable), type(table)
        return merged_slices(x, base, table, segments)


def merge_together(forms: Iterable[DeltaMatrix | None], dtype: torch.dtype) -> bool:
    """Whether one launch can add base and deltas up: slices of one kind, in half precision (tensor
    cores multiply no float32, and a library's product is faster without them).
    """
    every = list(forms)
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    kinds = set()
    for form in every:
        if not isinstance(form, BitSlices):
            return False
        kinds |= {piece.kind.of_blocks for piece in form.slices}
    return len(kinds) == 1


def merge_constants(kind: Kind, entries: int, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `merge_slices`."""
    each = min(_FIELDS, kind.fields)
    used = triton.cdiv(kind.used_fields, each) * each
    fields = kind.column_tiles * kind.fields if kind.column_tiles > 1 else used
    return {
        "BITS": kind.bits,
        "FIELDS": kind.fields,
        "EACH": each,
        "STEPS": fields // each,
        "BN": kind.block_rows,
        "BW": kind.block_words,
        "BT": MERGED_TOKENS,
        "ENTRIES": entries,
        "TILES": kind.column_tiles,
        "ONE_GROUP": kind.one_group,
        "BY_COLUMN": kind.by_column,
        "HALF_LEVELS": kind.level_dtype == torch.float16,
        "COMPUTE": compute_type(dtype),
        "PAIRS": in_pairs(dtype),
        "STAGES": _STAGES,
    }
