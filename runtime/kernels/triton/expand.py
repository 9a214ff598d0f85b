"""Packed slices back to numbers: rows of a table, or a whole weight with its base added."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltafold.runtime.kernels.triton.launch import on
from deltafold.runtime.kernels.triton.table import SliceTable
from deltafold.runtime.kernels.triton.unpack import field_values

#: Rows that one block of threads expands, by two warps: each thread then writes 16 bytes at a time.
_ROWS, _WARPS = 16, 2


@triton.jit
def _words(table, entry, at):  # type: ignore[no-untyped-def]
    words = tl.load(table + entry).to(tl.pointer_type(tl.int16))
    return tl.load(tl.multiple_of(words, 16) + at)


@triton.jit
def _levels(table, entry, at, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    if HALF:
        return tl.load(tl.load(table + entry).to(tl.pointer_type(tl.float16)) + at).to(tl.float32)
    else:
        return tl.load(tl.load(table + entry).to(tl.pointer_type(tl.float32)) + at)


@triton.jit
def expand(  # type: ignore[no-untyped-def]
    out, base, index, count, words_table, levels_table, factors_table, columns_table,
    rows, columns, group, level_stride, base_stride,
    BITS: tl.constexpr, FIELDS: tl.constexpr, USED: tl.constexpr, BN: tl.constexpr,
    BW: tl.constexpr, BR: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
    ONE_GROUP: tl.constexpr, INDEXED: tl.constexpr, BASED: tl.constexpr, BY_COLUMN: tl.constexpr,
    HALF_LEVELS: tl.constexpr,
):  # fmt: skip
    # BR output rows and one tile of columns; each field's columns are neighbours in the output.
    place = tl.program_id(0) * BR + tl.arange(0, BR)
    t = tl.program_id(1)
    kept = place < count
    if INDEXED:
        row = tl.load(index + place, mask=kept, other=0).to(tl.int64)
    else:
        row = tl.minimum(place, rows - 1).to(tl.int64)
    w = tl.arange(0, BW)
    at = ((row // BN * TILES + t) * BN + row % BN)[:, None] * BW + w[None, :]
    if ENTRIES == 1:
        # Read once: between stores the compiler cannot know that the words are still the same.
        word = _words(words_table, 0, at)
        factor = tl.load(factors_table)
        if ONE_GROUP:
            level = _levels(levels_table, 0, row, HALF_LEVELS)
    for j in tl.static_range(USED):
        k = t * (FIELDS * BW) + j * BW + w
        inside = kept[:, None] & (k < columns)[None, :]
        total = tl.zeros((BR, BW), dtype=tl.float32)
        if BASED:
            known = base + place.to(tl.int64)[:, None] * base_stride + k[None, :]
            total += tl.load(known, mask=inside, other=0.0).to(tl.float32)
        for entry in tl.static_range(ENTRIES):
            if ENTRIES > 1:
                word = _words(words_table, entry, at)
                factor = tl.load(factors_table + entry)
            if not ONE_GROUP:
                # A field's columns share a group.
                g = tl.minimum(t * (FIELDS * BW) + j * BW, columns - 1) // group
                level = _levels(
                    levels_table, entry, g.to(tl.int64) * level_stride + row, HALF_LEVELS
                )
            elif ENTRIES > 1:
                level = _levels(levels_table, entry, row, HALF_LEVELS)
            value = field_values(word, j, BITS, tl.float32, False) * (level * factor)[:, None]
            if BY_COLUMN:
                by_column = tl.load(columns_table + entry).to(tl.pointer_type(tl.float32))
                value *= tl.load(by_column + k, mask=k < columns, other=0.0)[None, :]
            total += value
        target = out + place.to(tl.int64)[:, None] * columns + k[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=inside)


def expand_slices(
    table: SliceTable,
    index: torch.Tensor | None,
    base: torch.Tensor | None,
    dtype: torch.dtype,
    first: bool = True,
) -> torch.Tensor:
    """The sum of one slot's slices.

    Args:
        table: of one part and one slot.
        index: int64 `[n]`, the rows to expand; None for all.
        base: `[N, M]` to add, or None. Where `first` is not set it is what an earlier call returned,
            with one row an output row.
        dtype: of the result.
        first: whether `base` is the base's own tensor.

    Returns:
        `[n, M]`, or `[N, M]`.
    """
    kind = table.kind
    (rows,) = table.widths
    count = rows if index is None else len(index)
    assert base is None or index is None or not first, "rows of a base are not added"
    assert base is None or base.stride(1) == 1
    out = torch.empty(count, kind.columns, dtype=dtype, device=table.words.device)
    if not count:
        return out
    with on(out.device):
        expand[(triton.cdiv(count, _ROWS), kind.column_tiles)](
            out, out if base is None else base, out if index is None else index, count,
            table.words, table.levels, table.factors, table.columns,
            rows, kind.columns, kind.group, table.blocks * kind.block_rows,
            0 if base is None else base.stride(0),
            BITS=kind.bits, FIELDS=kind.fields, USED=kind.used_fields, BN=kind.block_rows,
            BW=kind.block_words, BR=_ROWS,
            ENTRIES=table.entries, TILES=kind.column_tiles, ONE_GROUP=kind.one_group,
            INDEXED=index is not None, BASED=base is not None, BY_COLUMN=kind.by_column,
            HALF_LEVELS=kind.level_dtype == torch.float16, num_warps=_WARPS,
        )  # fmt: skip
    return out
