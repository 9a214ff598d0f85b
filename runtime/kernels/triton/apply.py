"""The kernel: tokens times the packed slices of their variants, all variants in one launch.

So are all parts of a layer: linears that read the same input (see `parts`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafold.runtime.kernels.triton.parts import chosen, part_of
from deltafold.runtime.kernels.triton.unpack import field_values


@triton.jit
def apply_slices(  # type: ignore[no-untyped-def]
    x, y0, y1, y2, y3, partial, order, tile_slot, tile_start, tile_length, scales,
    words_table, levels_table, factors_table, columns_table, counts, slot_rows, first, widths,
    slots, columns, x_stride, y0_stride, y1_stride, y2_stride, y3_stride,
    place_stride, split_stride, group,
    BITS: tl.constexpr, FIELDS: tl.constexpr, USED: tl.constexpr, FOLD: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, ENTRIES: tl.constexpr,
    TILES: tl.constexpr, SPLITS: tl.constexpr, TILES_EACH: tl.constexpr, EVEN: tl.constexpr,
    BY_COLUMN: tl.constexpr, HALF_LEVELS: tl.constexpr, SCALED: tl.constexpr,
    DIRECT: tl.constexpr, COMPUTE: tl.constexpr, PAIRS: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    # One block of rows of one part, a share of the columns (`split`), and up to BT tokens of one
    # variant.
    tile = tl.program_id(1)
    length = tl.load(tile_length + tile)
    if length <= 0:
        return
    numbered = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    part = part_of(numbered, first, PARTS)
    block = numbered
    if PARTS > 1:
        block -= tl.load(first + part)
    slot = part * slots + tl.load(tile_slot + tile)
    rows = tl.load(slot_rows + slot)
    place = tl.load(tile_start + tile) + tl.arange(0, BT)
    here = tl.arange(0, BT) < length
    token = tl.load(order + place, mask=here, other=0)
    n = block * BN + tl.arange(0, BN)
    w = tl.arange(0, BW)
    inputs = x + token.to(tl.int64)[None, :] * x_stride
    within = tl.arange(0, BN)[:, None] * BW + w[None, :]
    TK: tl.constexpr = FIELDS * BW
    level_stride = tl.cdiv(rows, BN) * BN

    # A variant with fewer rows than others has nothing to add in the last blocks.
    count = tl.where(block * BN < rows, tl.load(counts + slot), 0)
    total = tl.zeros((BN, BT), dtype=tl.float32)
    # Bounds are constants: the interpreter takes no others, and the compiler plans better with them.
    for entry in range(ENTRIES):
        if entry < count:
            at = slot * ENTRIES + entry
            # What an address is a multiple of only we know; without it loads are 2 bytes wide.
            words = tl.load(words_table + at).to(tl.pointer_type(tl.int16))
            tiles = tl.multiple_of(words, 16) + block.to(tl.int64) * (TILES * BN * BW) + within
            if HALF_LEVELS:
                levels = tl.load(levels_table + at).to(tl.pointer_type(tl.float16))
            else:
                levels = tl.load(levels_table + at).to(tl.pointer_type(tl.float32))
            levels = tl.multiple_of(levels, 16) + n
            factor = tl.load(factors_table + at)
            if BY_COLUMN:
                by_column = tl.load(columns_table + at).to(tl.pointer_type(tl.float32))
            sums = tl.zeros((BN, BT), dtype=tl.float32)
            for step in tl.range(0, TILES_EACH, num_stages=STAGES):
                t = split * TILES_EACH + step
                # The last split may have fewer tiles: it meets activations of zero there.
                word = tl.load(tiles + tl.minimum(t, TILES - 1) * (BN * BW))
                for j in tl.static_range(USED):
                    k = t * TK + j * BW + w
                    if EVEN:
                        taken = tl.load(inputs + k[:, None])
                    else:
                        taken = tl.load(inputs + k[:, None], mask=(k < columns)[:, None], other=0.0)
                    if BY_COLUMN:
                        by = tl.load(by_column + k, mask=k < columns, other=0.0)
                        taken = taken.to(tl.float32) * by[:, None]
                    taken = taken.to(COMPUTE)
                    weight = field_values(word, j, BITS, COMPUTE, PAIRS)
                    sums = tl.dot(weight, taken, sums, input_precision="ieee")
                    if FOLD > 0 and (j + 1) % FOLD == 0:
                        # Of the first of these fields: the last may lie beyond the columns.
                        begins = t * TK + (j + 1 - FOLD) * BW
                        inside = (n >= 0) & (begins < columns)
                        at_group = levels + begins // group * level_stride
                        level = tl.load(at_group, mask=inside, other=0.0).to(tl.float32)
                        total += sums * (level * factor)[:, None]
                        sums = tl.zeros((BN, BT), dtype=tl.float32)
            if FOLD == 0:
                total += sums * (tl.load(levels).to(tl.float32) * factor)[:, None]

    if SCALED:
        total *= tl.load(scales + token, mask=here, other=0.0)[None, :]
    kept = here[None, :] & (n < tl.load(widths + part))[:, None]
    if DIRECT:
        y = chosen(part, y0, y1, y2, y3, PARTS)
        y_stride = chosen(part, y0_stride, y1_stride, y2_stride, y3_stride, PARTS)
        target = y + token.to(tl.int64)[None, :] * y_stride + n[:, None]
        known = tl.load(target, mask=kept, other=0.0)
        tl.store(target, (known.to(tl.float32) + total).to(known.dtype), mask=kept)
    else:
        held = (
            partial
            + split.to(tl.int64) * split_stride
            + (numbered * BN + tl.arange(0, BN))[:, None]
        )
        tl.store(held + place.to(tl.int64)[None, :] * place_stride, total, mask=kept)


@triton.jit
def add_splits(  # type: ignore[no-untyped-def]
    partial, y0, y1, y2, y3, order, begin, first, widths,
    y0_stride, y1_stride, y2_stride, y3_stride, place_stride, split_stride,
    SPLITS: tl.constexpr, BN: tl.constexpr, BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Sums the splits of one token in their order, so that equal batches give equal bits.
    place = tl.program_id(1)
    part = tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    width = tl.load(widths + part)
    if (place < tl.load(begin)) | (tl.program_id(0) * BN >= width):
        return
    kept = n < width
    total = tl.zeros((BN,), dtype=tl.float32)
    at = partial + place.to(tl.int64) * place_stride + tl.load(first + part) * BLOCK_ROWS + n
    for _ in range(SPLITS):
        total += tl.load(at, mask=kept, other=0.0)
        at += split_stride
    token = tl.load(order + place).to(tl.int64)
    y = chosen(part, y0, y1, y2, y3, PARTS)
    target = y + token * chosen(part, y0_stride, y1_stride, y2_stride, y3_stride, PARTS) + n
    known = tl.load(target, mask=kept, other=0.0)
    tl.store(target, (known.to(tl.float32) + total).to(known.dtype), mask=kept)
