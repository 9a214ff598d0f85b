"""The kernel: tokens times the packed slices of their variants, all variants in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from deltafold.runtime.kernels.triton.unpack import field_values


@triton.jit
def apply_slices(  # type: ignore[no-untyped-def]
    x, out, order, tile_slot, tile_start, tile_length, scales,
    words_table, levels_table, factors_table, columns_table, counts,
    rows, columns, x_stride, out_stride, split_stride, group, level_stride,
    BITS: tl.constexpr, FIELDS: tl.constexpr, USED: tl.constexpr, FOLD: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, ENTRIES: tl.constexpr,
    TILES: tl.constexpr, SPLITS: tl.constexpr, TILES_EACH: tl.constexpr, EVEN: tl.constexpr,
    BY_COLUMN: tl.constexpr, HALF_LEVELS: tl.constexpr, SCALED: tl.constexpr,
    DIRECT: tl.constexpr, COMPUTE: tl.constexpr, PAIRS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One block of rows, a share of the columns (`split`), and up to BT tokens of one variant.
    tile = tl.program_id(1)
    length = tl.load(tile_length + tile)
    if length <= 0:
        return
    block = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    slot = tl.load(tile_slot + tile)
    place = tl.load(tile_start + tile) + tl.arange(0, BT)
    here = tl.arange(0, BT) < length
    token = tl.load(order + place, mask=here, other=0)
    n = block * BN + tl.arange(0, BN)
    w = tl.arange(0, BW)
    inputs = x + token.to(tl.int64)[None, :] * x_stride
    within = tl.arange(0, BN)[:, None] * BW + w[None, :]
    TK: tl.constexpr = FIELDS * BW

    count = tl.load(counts + slot)
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
            part = tl.zeros((BN, BT), dtype=tl.float32)
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
                    part = tl.dot(weight, taken, part, input_precision="ieee")
                    if FOLD > 0 and (j + 1) % FOLD == 0:
                        first = t * TK + j * BW
                        inside = (n >= 0) & (first < columns)
                        at_group = levels + first // group * level_stride
                        level = tl.load(at_group, mask=inside, other=0.0).to(tl.float32)
                        total += part * (level * factor)[:, None]
                        part = tl.zeros((BN, BT), dtype=tl.float32)
            if FOLD == 0:
                total += part * (tl.load(levels).to(tl.float32) * factor)[:, None]

    if SCALED:
        total *= tl.load(scales + token, mask=here, other=0.0)[None, :]
    kept = here[None, :] & (n < rows)[:, None]
    if DIRECT:
        target = out + token.to(tl.int64)[None, :] * out_stride + n[:, None]
        known = tl.load(target, mask=kept, other=0.0)
        tl.store(target, (known.to(tl.float32) + total).to(known.dtype), mask=kept)
    else:
        partial = out + split.to(tl.int64) * split_stride + place.to(tl.int64)[None, :] * out_stride
        tl.store(partial + n[:, None], total, mask=kept)


@triton.jit
def add_splits(  # type: ignore[no-untyped-def]
    partial, y, order, begin, rows, partial_stride, split_stride, y_stride,
    SPLITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # Sums the splits of one token in their order, so that equal batches give equal bits.
    place = tl.program_id(1)
    if place < tl.load(begin):
        return
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    kept = n < rows
    total = tl.zeros((BN,), dtype=tl.float32)
    at = partial + place.to(tl.int64) * partial_stride + n
    for _ in range(SPLITS):
        total += tl.load(at, mask=kept, other=0.0)
        at += split_stride
    token = tl.load(order + place).to(tl.int64)
    target = y + token * y_stride + n
    known = tl.load(target, mask=kept, other=0.0)
    tl.store(target, (known.to(tl.float32) + total).to(known.dtype), mask=kept)
