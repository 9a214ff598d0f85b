"""Low-rank deltas of all variants of a batch, in two launches: into the ranks, and out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.kernels.triton.launch import compute_type, on
from deltafold.runtime.kernels.triton.segments import Segments

_COLUMNS, _ROWS = 128, 64


@triton.jit
def shrink(  # type: ignore[no-untyped-def]
    x, ranked, order, tile_slot, tile_start, tile_length, a_table, ranks, counts,
    columns, x_stride,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, ENTRIES: tl.constexpr,
    STEPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    # ranked[place, entry] = x[order[place]] A^T: one entry of one tile's slot.
    tile = tl.program_id(1)
    entry = tl.program_id(0)
    slot = tl.load(tile_slot + tile)
    length = tl.load(tile_length + tile)
    if (length <= 0) | (entry >= tl.load(counts + slot)):
        return
    place = tl.load(tile_start + tile) + tl.arange(0, BT)
    here = tl.arange(0, BT) < length
    token = tl.load(order + place, mask=here, other=0).to(tl.int64)
    a = tl.load(a_table + slot * ENTRIES + entry).to(tl.pointer_type(x.dtype.element_ty))
    rank = tl.load(ranks + slot * ENTRIES + entry)
    r = tl.arange(0, R)
    total = tl.zeros((BT, R), dtype=tl.float32)
    for step in range(STEPS):
        k = step * BK + tl.arange(0, BK)
        some = (k < columns)[None, :]
        taken = tl.load(x + token[:, None] * x_stride + k[None, :], mask=some, other=0.0)
        down = tl.load(
            a + r[:, None] * columns + k[None, :], mask=some & (r < rank)[:, None], other=0.0
        )
        total = tl.dot(taken.to(COMPUTE), tl.trans(down.to(COMPUTE)), total, input_precision="ieee")
    target = ranked + (place[:, None] * ENTRIES + entry) * R + r[None, :]
    tl.store(target, total, mask=here[:, None])


@triton.jit
def stretch(  # type: ignore[no-untyped-def]
    ranked, y, order, tile_slot, tile_start, tile_length, b_table, factors_table, ranks, counts,
    scales, rows, y_stride,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, ENTRIES: tl.constexpr,
    SCALED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    # y[token] += sum over entries of factor * ranked B^T, for BN rows of B.
    tile = tl.program_id(1)
    slot = tl.load(tile_slot + tile)
    length = tl.load(tile_length + tile)
    if length <= 0:
        return
    place = tl.load(tile_start + tile) + tl.arange(0, BT)
    here = tl.arange(0, BT) < length
    token = tl.load(order + place, mask=here, other=0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, R)
    count = tl.load(counts + slot)
    total = tl.zeros((BT, BN), dtype=tl.float32)
    for entry in range(ENTRIES):
        if entry < count:
            at = slot * ENTRIES + entry
            b = tl.load(b_table + at).to(tl.pointer_type(y.dtype.element_ty))
            rank = tl.load(ranks + at)
            some = (n < rows)[:, None] & (r < rank)[None, :]
            up = tl.load(b + n[:, None] * rank + r[None, :], mask=some, other=0.0)
            held = ranked + (place[:, None] * ENTRIES + entry) * R + r[None, :]
            inner = tl.load(held, mask=here[:, None], other=0.0) * tl.load(factors_table + at)
            total = tl.dot(
                inner.to(COMPUTE), tl.trans(up.to(COMPUTE)), total, input_precision="ieee"
            )
    if SCALED:
        total *= tl.load(scales + token, mask=here, other=0.0)[:, None]
    kept = here[:, None] & (n < rows)[None, :]
    target = y + token[:, None] * y_stride + n[None, :]
    known = tl.load(target, mask=kept, other=0.0)
    tl.store(target, (known.to(tl.float32) + total).to(known.dtype), mask=kept)


@dataclass(frozen=True, eq=False)
class FactorTable:
    """Low-rank factors by slot; the addresses stay valid only while the factors live.

    Attributes:
        counts: int32 `[slots]`.
        a: int64 `[slots, entries]`, addresses of `[rank, M]`.
        b: int64 `[slots, entries]`, addresses of `[N, rank]`.
        ranks: int32 `[slots, entries]`.
        factors: float32 `[slots, entries]`.
        widest: the largest rank.
    """

    counts: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    factors: torch.Tensor
    widest: int


def make_factor_table(
    by_slot: Sequence[Sequence[tuple[Factors, float]]], device: torch.device
) -> FactorTable:
    """Factors of each slot, each with a weight; all contiguous and of the activations' dtype."""
    entries = max([len(forms) for forms in by_slot], default=0) or 1
    shape = (len(by_slot), entries)
    numbers = torch.zeros(4, *shape, dtype=torch.int64)
    weights = torch.zeros(shape)
    for slot, forms in enumerate(by_slot):
        numbers[0, slot, 0] = len(forms)
        for i, (form, weight) in enumerate(forms):
            assert form.a.is_contiguous()
            assert form.b.is_contiguous()
            numbers[1, slot, i], numbers[2, slot, i] = form.a.data_ptr(), form.b.data_ptr()
            numbers[3, slot, i] = form.a.shape[0]
            weights[slot, i] = weight
    widest = int(numbers[3].max()) if numbers.numel() else 0
    there = numbers.to(device)
    return FactorTable(
        counts=there[0, :, 0].to(torch.int32),
        a=there[1],
        b=there[2],
        ranks=there[3].to(torch.int32),
        factors=weights.to(device),
        widest=widest,
    )


def add_factors(y: torch.Tensor, x: torch.Tensor, table: FactorTable, segments: Segments) -> None:
    """`y[t] += s[t] * sum_i factor_i (x[t] A_i^T) B_i^T` over the factors of token t's slot.

    Args:
        y: `[T, N]`, changed in place; tokens of the base are not touched.
        x: `[T, M]` of the same dtype.
        table: the factors by slot.
        segments: which slot each token has.
    """
    assert x.dtype == y.dtype, (x.dtype, y.dtype)
    assert x.stride(1) == 1 == y.stride(1), "rows must be contiguous"
    entries, rank = table.a.shape[1], max(16, triton.next_power_of_2(table.widest))
    if not segments.tiles or not table.widest:
        return
    tokens, columns = x.shape
    rows = y.shape[1]
    ranked = torch.empty(tokens, entries, rank, dtype=torch.float32, device=x.device)
    tiles = (segments.order, segments.slot, segments.start, segments.length)
    compute = compute_type(x.dtype)
    with on(x.device):
        shrink[(entries, segments.tiles)](
            x, ranked, *tiles, table.a, table.ranks, table.counts, columns, x.stride(0),
            BT=segments.block, BK=_COLUMNS, R=rank, ENTRIES=entries,
            STEPS=triton.cdiv(columns, _COLUMNS), COMPUTE=compute,
        )  # fmt: skip
    scaled = segments.scales is not None
    with on(x.device):
        stretch[(triton.cdiv(rows, _ROWS), segments.tiles)](
            ranked, y, *tiles, table.b, table.factors, table.ranks, table.counts,
            segments.scales if scaled else segments.order, rows, y.stride(0),
            BT=segments.block, BN=_ROWS, R=rank, ENTRIES=entries, SCALED=scaled, COMPUTE=compute,
        )  # fmt: skip
