"""Low-rank deltas of all variants of a batch, in two launches: into the ranks, and out of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.kernels.triton.launch import compute_type, on, splits_for
from deltafold.runtime.kernels.triton.parts import chosen, first_blocks, outputs, part_of
from deltafold.runtime.kernels.triton.segments import Segments
from deltafold.runtime.kernels.triton.table import ByPart, Packed

#: Columns and rows of one step, and most ranks of it: higher ranks take several steps, so that what a
#: block of threads holds does not grow with them.
_COLUMNS, _ROWS, _RANKS = 128, 64, 64
_LEAST_RANKS = 16


@triton.jit
def shrink(  # type: ignore[no-untyped-def]
    x, ranked, order, tile_slot, tile_start, tile_length, a_table, ranks, counts,
    slots, columns, rank_blocks, x_stride, split_stride,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ENTRIES: tl.constexpr,
    STEPS: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # ranked[split, place, part, entry] = x[order[place]] A^T over a share of the columns: BR ranks of
    # one entry of one part of one tile's slot.
    tile = tl.program_id(1)
    split = tl.program_id(2)
    numbered = tl.program_id(0) // rank_blocks
    part = numbered // ENTRIES
    entry = numbered % ENTRIES
    slot = part * slots + tl.load(tile_slot + tile)
    length = tl.load(tile_length + tile)
    if (length <= 0) | (entry >= tl.load(counts + slot)):
        return
    first = tl.program_id(0) % rank_blocks * BR
    rank = tl.load(ranks + slot * ENTRIES + entry)
    if first >= rank:
        return
    place = tl.load(tile_start + tile) + tl.arange(0, BT)
    here = tl.arange(0, BT) < length
    token = tl.load(order + place, mask=here, other=0).to(tl.int64)
    # What an address is a multiple of only we know; without it loads are 2 bytes wide.
    a = tl.load(a_table + slot * ENTRIES + entry).to(tl.pointer_type(x.dtype.element_ty))
    a = tl.multiple_of(a, ALIGNED)
    r = first + tl.arange(0, BR)
    total = tl.zeros((BT, BR), dtype=tl.float32)
    for step in range(STEPS):
        k = (split * STEPS + step) * BK + tl.arange(0, BK)
        some = (k < columns)[None, :]
        taken = tl.load(x + token[:, None] * x_stride + k[None, :], mask=some, other=0.0)
        down = tl.load(
            a + r.to(tl.int64)[:, None] * columns + k[None, :],
            mask=some & (r < rank)[:, None],
            other=0.0,
        )
        total = tl.dot(taken.to(COMPUTE), tl.trans(down.to(COMPUTE)), total, input_precision="ieee")
    at = (place.to(tl.int64)[:, None] * PARTS + part) * ENTRIES + entry
    target = ranked + split.to(tl.int64) * split_stride + at * (rank_blocks * BR) + r[None, :]
    tl.store(target, total, mask=here[:, None])


@triton.jit
def stretch(  # type: ignore[no-untyped-def]
    ranked, y0, y1, y2, y3, order, tile_slot, tile_start, tile_length, b_table, factors_table,
    ranks, counts, scales, first, widths, slots, rank_blocks, split_stride,
    y0_stride, y1_stride, y2_stride, y3_stride,
    BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, ENTRIES: tl.constexpr,
    SPLITS: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    COMPUTE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # y[token] += sum over entries of factor * ranked B^T, for BN rows of one part's B.
    tile = tl.program_id(1)
    part = part_of(tl.program_id(0), first, PARTS)
    rows = tl.load(widths + part)
    slot = part * slots + tl.load(tile_slot + tile)
    length = tl.load(tile_length + tile)
    if length <= 0:
        return
    place = tl.load(tile_start + tile) + tl.arange(0, BT)
    here = tl.arange(0, BT) < length
    token = tl.load(order + place, mask=here, other=0).to(tl.int64)
    n = (tl.program_id(0) - tl.load(first + part)) * BN + tl.arange(0, BN)
    count = tl.load(counts + slot)
    total = tl.zeros((BT, BN), dtype=tl.float32)
    for entry in range(ENTRIES):
        if entry < count:
            at = slot * ENTRIES + entry
            b = tl.load(b_table + at).to(tl.pointer_type(y0.dtype.element_ty))
            b = tl.multiple_of(b, ALIGNED)
            rank = tl.multiple_of(tl.load(ranks + at), EVEN)
            factor = tl.load(factors_table + at)
            held = (place.to(tl.int64)[:, None] * PARTS + part) * ENTRIES + entry
            held = ranked + held * (rank_blocks * BR)
            # Each entry takes as many steps as its own rank needs, whatever the others' are.
            begin = rank * 0
            while begin < rank:
                r = begin + tl.arange(0, BR)
                inside = (r < rank)[None, :]
                up = tl.load(
                    b + n.to(tl.int64)[:, None] * rank + r[None, :],
                    mask=(n < rows)[:, None] & inside,
                    other=0.0,
                )
                kept = here[:, None] & inside
                inner = tl.load(held + r[None, :], mask=kept, other=0.0)
                for split in range(1, SPLITS):
                    inner += tl.load(held + split * split_stride + r[None, :], mask=kept, other=0.0)
                inner *= factor
                total = tl.dot(
                    inner.to(COMPUTE), tl.trans(up.to(COMPUTE)), total, input_precision="ieee"
                )
                begin += BR
    if SCALED:
        total *= tl.load(scales + token, mask=here, other=0.0)[:, None]
    kept = here[:, None] & (n < rows)[None, :]
    y = chosen(part, y0, y1, y2, y3, PARTS)
    y_stride = chosen(part, y0_stride, y1_stride, y2_stride, y3_stride, PARTS)
    target = y + token[:, None] * y_stride + n[None, :]
    known = tl.load(target, mask=kept, other=0.0)
    tl.store(target, (known.to(tl.float32) + total).to(known.dtype), mask=kept)


@dataclass(frozen=True, eq=False)
class FactorTable:
    """Low-rank factors by part and slot; the addresses stay valid only while the factors live.

    Attributes:
        counts: int32 `[parts, slots]`.
        addresses: int64 `[2, parts, slots, entries]`, of `[rank, M]` and of `[N, rank]`.
        ranks: int32 `[parts, slots, entries]`.
        factors: float32 `[parts, slots, entries]`.
        places: int32 `[2, parts + 1]`: first block of rows of each part, and its width.
        widths: rows of each part.
        widest: the largest rank.
        aligned: what all addresses are multiples of, in bytes up to 16.
        even: what all ranks are multiples of, up to 16.
    """

    counts: torch.Tensor
    addresses: torch.Tensor
    ranks: torch.Tensor
    factors: torch.Tensor
    places: torch.Tensor
    widths: tuple[int, ...]
    widest: int
    aligned: int
    even: int


def make_factor_table(by_part: ByPart[Factors], device: torch.device) -> FactorTable:
    """Factors of each part's slots, each with a weight; contiguous and of the activations' dtype."""
    packed = Packed.of(by_part, columns=2)
    ranks = torch.zeros(packed.shape, dtype=torch.int64)
    widths = [0] * len(by_part)
    for part, slot, i, form, weight in packed.each(by_part):
        assert form.a.is_contiguous()
        assert form.b.is_contiguous()
        packed.put(part, slot, i, (form.a.data_ptr(), form.b.data_ptr()), weight)
        ranks[part, slot, i] = form.a.shape[0]
        assert widths[part] in (0, form.b.shape[0]), "forms of one part have the same rows"
        widths[part] = form.b.shape[0]
    places = torch.tensor([first_blocks(widths, _ROWS), [*widths, 0]], dtype=torch.int64)
    widest = int(ranks.max()) if ranks.numel() else 0
    aligned = math.gcd(16, *packed.addresses.reshape(-1).tolist())
    even = math.gcd(16, *ranks.reshape(-1).tolist())
    counts, addresses, factors, (there, where) = packed.sent(device, [ranks, places])
    return FactorTable(
        counts, addresses, there, factors, where, tuple(widths), widest, aligned, even
    )


def add_factors(
    ys: Sequence[torch.Tensor], x: torch.Tensor, table: FactorTable, segments: Segments
) -> None:
    """`y_p[t] += s[t] * sum_i factor_i (x[t] A_pi^T) B_pi^T` over the factors of part p, t's slot.

    Args:
        ys: an output `[T, N_p]` for each part, changed in place; tokens of the base are not touched.
        x: `[T, M]` of the same dtype.
        table: the factors by part and slot.
        segments: which slot each token has.
    """
    assert all(x.dtype == y.dtype for y in ys), x.dtype
    assert x.stride(1) == 1, "rows must be contiguous"
    parts, slots, entries = table.factors.shape
    blocks = first_blocks(table.widths, _ROWS)[-1]
    if not segments.tiles or not table.widest or not blocks:
        return
    ranks = ranks_for(table.widest)
    rank_blocks = triton.cdiv(table.widest, ranks)
    tokens, columns = x.shape
    wide = columns_for(x.dtype)
    steps = triton.cdiv(columns, wide)
    splits = splits_for(parts * entries * rank_blocks * segments.tiles, steps, x.device)
    shape = (splits, tokens, parts, entries, rank_blocks * ranks)
    ranked = torch.empty(shape, dtype=torch.float32, device=x.device)
    tiles = (segments.order, segments.slot, segments.start, segments.length)
    scaled = segments.scales is not None
    held, strides = outputs(ys)
    down, up = table.addresses.unbind(0)
    both: dict[str, Any] = {
        "BT": segments.block,
        "BR": ranks,
        "ENTRIES": entries,
        "ALIGNED": table.aligned,
        "COMPUTE": compute_type(x.dtype),
        "PARTS": parts,
        **warps_for(segments.block, x.dtype),
    }
    with on(x.device):
        shrink[(parts * entries * rank_blocks, segments.tiles, splits)](
            x, ranked, *tiles, down, table.ranks, table.counts, slots, columns, rank_blocks,
            x.stride(0), ranked.stride(0), BK=wide, STEPS=triton.cdiv(steps, splits), **both,
        )  # fmt: skip
        stretch[(blocks, segments.tiles)](
            ranked, *held, *tiles, up, table.factors, table.ranks, table.counts,
            segments.scales if scaled else segments.order, *table.places.unbind(0), slots,
            rank_blocks, ranked.stride(0), *strides, BN=_ROWS, SPLITS=splits, SCALED=scaled,
            EVEN=table.even, **both,
        )  # fmt: skip


def ranks_for(widest: int) -> int:
    """BR: ranks of one step, a power of two."""
    return int(max(_LEAST_RANKS, min(_RANKS, triton.next_power_of_2(widest))))


def columns_for(dtype: torch.dtype) -> int:
    """BK: columns of one step, whose bytes fit the shared memory of small GPUs too."""
    return _COLUMNS // 2 if dtype == torch.float32 else _COLUMNS


def warps_for(block: int, dtype: torch.dtype) -> dict[str, int]:
    """Warps, by the size of what they hold in registers."""
    return {"num_warps": 8 if block >= 32 and dtype == torch.float32 else 4}
