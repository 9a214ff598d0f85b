"""Rows of packed embedding tables, each token its variant's, all variants in one launch."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from deltafold.runtime.kernels.triton.launch import on
from deltafold.runtime.kernels.triton.segments import Segments
from deltafold.runtime.kernels.triton.table import SliceTable
from deltafold.runtime.kernels.triton.unpack import field_values

#: Tokens of one block of threads, which has one warp: each thread then writes neighbouring columns.
_TOKENS: Final = 8


@triton.jit
def look_up(  # type: ignore[no-untyped-def]
    y, ids, order, tile_slot, tile_start, tile_length, scales,
    words_table, levels_table, factors_table, columns_table, counts, slot_rows,
    columns, y_stride, group,
    BITS: tl.constexpr, FIELDS: tl.constexpr, USED: tl.constexpr, BN: tl.constexpr,
    BW: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, ENTRIES: tl.constexpr,
    TILES: tl.constexpr, ONE_GROUP: tl.constexpr, BY_COLUMN: tl.constexpr,
    HALF_LEVELS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # BR tokens of one tile and one tile of columns.
    tile = tl.program_id(0) // (BT // BR)
    start = tl.program_id(0) % (BT // BR) * BR
    length = tl.load(tile_length + tile) - start
    if length <= 0:
        return
    t = tl.program_id(1)
    here = tl.arange(0, BR) < length
    place = tl.load(tile_start + tile) + start + tl.arange(0, BR)
    token = tl.load(order + place, mask=here, other=0).to(tl.int64)
    slot = tl.load(tile_slot + tile)
    rows = tl.load(slot_rows + slot)
    # Ids that a smaller vocabulary lacks stand for padding alone.
    row = tl.minimum(tl.load(ids + token, mask=here, other=0), rows - 1)
    level_stride = tl.cdiv(rows, BN) * BN
    w = tl.arange(0, BW)
    at = ((row // BN * TILES + t) * BN + row % BN)[:, None] * BW + w[None, :]
    count = tl.load(counts + slot)
    for j in tl.static_range(USED):
        first = t * (FIELDS * BW) + j * BW
        k = first + w
        inside = here[:, None] & (k < columns)[None, :]
        total = tl.zeros((BR, BW), dtype=tl.float32)
        for entry in tl.static_range(ENTRIES):
            mine = slot * ENTRIES + entry
            some = here & (entry < count)
            words = tl.load(words_table + mine).to(tl.pointer_type(tl.int16))
            word = tl.load(
                tl.multiple_of(words, 16) + at, mask=some[:, None] & (w >= 0)[None, :], other=0
            )
            place_of_level = row
            if not ONE_GROUP:
                g = tl.minimum(first, columns - 1) // group
                place_of_level += g.to(tl.int64) * level_stride
            if HALF_LEVELS:
                levels = tl.load(levels_table + mine).to(tl.pointer_type(tl.float16))
            else:
                levels = tl.load(levels_table + mine).to(tl.pointer_type(tl.float32))
            level = tl.load(levels + place_of_level, mask=some, other=0.0).to(tl.float32)
            level *= tl.load(factors_table + mine)
            value = field_values(word, j, BITS, tl.float32, False) * level[:, None]
            if BY_COLUMN:
                by_column = tl.load(columns_table + mine).to(tl.pointer_type(tl.float32))
                taken = tl.load(by_column + k, mask=(k < columns) & (entry < count), other=0.0)
                value *= taken[None, :]
            total += value
        if SCALED:
            total *= tl.load(scales + token, mask=here, other=0.0)[:, None]
        target = y + token[:, None] * y_stride + k[None, :]
        known = tl.load(target, mask=inside, other=0.0)
        tl.store(target, (known.to(tl.float32) + total).to(known.dtype), mask=inside)


def add_rows(y: torch.Tensor, ids: torch.Tensor, table: SliceTable, segments: Segments) -> None:
    """`y[t] += s[t] * sum_i factor_i D_i[ids[t]]` over the slices of token t's slot.

    Args:
        y: `[T, M]` float32, bfloat16 or float16, changed in place; tokens of the base are not touched.
        ids: int64 `[T]`.
        table: the slices by slot, of one part.
        segments: which slot each token has.
    """
    kind = table.kind
    assert y.shape == (segments.tokens, kind.columns), (y.shape, kind)
    assert ids.shape == (segments.tokens,), ids.shape
    assert table.parts == 1 == y.stride(1)
    assert ids.is_contiguous()
    if not segments.tiles:
        return
    scaled = segments.scales is not None
    with on(y.device):
        look_up[(segments.tiles * (segments.block // _TOKENS), kind.column_tiles)](
            y, ids, segments.order, segments.slot, segments.start, segments.length,
            segments.scales if scaled else segments.order,
            table.words, table.levels, table.factors, table.columns, table.counts, table.rows,
            kind.columns, y.stride(0), kind.group,
            BITS=kind.bits, FIELDS=kind.fields, USED=kind.used_fields, BN=kind.block_rows,
            BW=kind.block_words, BT=segments.block, BR=_TOKENS, ENTRIES=table.entries,
            TILES=kind.column_tiles, ONE_GROUP=kind.one_group, BY_COLUMN=kind.by_column,
            HALF_LEVELS=kind.level_dtype == torch.float16, SCALED=scaled, num_warps=1,
        )  # fmt: skip
