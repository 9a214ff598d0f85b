"""Dense deltas of all variants of a batch, in one launch: what no packed form could hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.kernels.triton.launch import compute_type, on
from deltafold.runtime.kernels.triton.lowrank import columns_for, warps_for
from deltafold.runtime.kernels.triton.parts import chosen, first_blocks, outputs, part_of
from deltafold.runtime.kernels.triton.segments import Segments
from deltafold.runtime.kernels.triton.table import ByPart, Packed

#: Tokens of one variant from which its own product by the vendor's library is left alone: it reads each
#: weight once for all of them, a launch of ours once for every tile of tokens.
REBUILD_ABOVE = 64
#: Rows of a block of threads. Few, so that narrow layers fill a GPU too.
_ROWS = 64


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    x, y0, y1, y2, y3, order, tile_slot, tile_start, tile_length, weights_table, factors_table,
    counts, scales, first, widths, slots, columns, x_stride,
    y0_stride, y1_stride, y2_stride, y3_stride,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ENTRIES: tl.constexpr,
    STEPS: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    # y[token] += sum over entries of factor * x[token] D^T, for BN rows of one part's D.
    tile = tl.program_id(1)
    part = part_of(tl.program_id(0), first, PARTS)
    rows = tl.load(widths + part)
    slot = part * slots + tl.load(tile_slot + tile)
    length = tl.load(tile_length + tile)
    count = tl.load(counts + slot)
    if (length <= 0) | (count <= 0):
        return
    place = tl.load(tile_start + tile) + tl.arange(0, BT)
    here = tl.arange(0, BT) < length
    token = tl.load(order + place, mask=here, other=0).to(tl.int64)
    n = (tl.program_id(0) - tl.load(first + part)) * BN + tl.arange(0, BN)
    inside = n < rows
    total = tl.zeros((BT, BN), dtype=tl.float32)
    for entry in range(ENTRIES):
        if entry < count:
            at = slot * ENTRIES + entry
            # What an address is a multiple of only we know; without it loads are 2 bytes wide.
            weight = tl.load(weights_table + at).to(tl.pointer_type(y0.dtype.element_ty))
            weight = tl.multiple_of(weight, ALIGNED)
            product = tl.zeros((BT, BN), dtype=tl.float32)
            for step in range(STEPS):
                k = step * BK + tl.arange(0, BK)
                some = (k < columns)[None, :]
                taken = tl.load(x + token[:, None] * x_stride + k[None, :], mask=some, other=0.0)
                down = tl.load(
                    weight + n.to(tl.int64)[:, None] * columns + k[None, :],
                    mask=some & inside[:, None],
                    other=0.0,
                )
                product = tl.dot(
                    taken.to(COMPUTE), tl.trans(down.to(COMPUTE)), product, input_precision="ieee"
                )
            total += product * tl.load(factors_table + at)
    if SCALED:
        total *= tl.load(scales + token, mask=here, other=0.0)[:, None]
    kept = here[:, None] & inside[None, :]
    y = chosen(part, y0, y1, y2, y3, PARTS)
    y_stride = chosen(part, y0_stride, y1_stride, y2_stride, y3_stride, PARTS)
    target = y + token[:, None] * y_stride + n[None, :]
    known = tl.load(target, mask=kept, other=0.0)
    tl.store(target, (known.to(tl.float32) + total).to(known.dtype), mask=kept)


@dataclass(frozen=True, eq=False)
class DenseTable:
    """Dense deltas by part and slot; the addresses stay valid only while the deltas live.

    Attributes:
        counts: int32 `[parts, slots]`.
        addresses: int64 `[parts, slots, entries]`, of `[N, M]`.
        factors: float32 `[parts, slots, entries]`.
        places: int32 `[2, parts + 1]`: first block of rows of each part, and its width.
        widths: rows of each part.
        aligned: what all addresses are multiples of, in bytes up to 16.
    """

    counts: torch.Tensor
    addresses: torch.Tensor
    factors: torch.Tensor
    places: torch.Tensor
    widths: tuple[int, ...]
    aligned: int


def make_dense_table(by_part: ByPart[Dense], device: torch.device) -> DenseTable:
    """Dense deltas of each part's slots, each with a weight; contiguous, of the activations' dtype."""
    packed = Packed.of(by_part, columns=1)
    widths = [0] * len(by_part)
    for part, slot, i, form, weight in packed.each(by_part):
        assert form.weight.is_contiguous()
        packed.put(part, slot, i, (form.weight.data_ptr(),), weight)
        assert widths[part] in (0, form.weight.shape[0]), "forms of one part have the same rows"
        widths[part] = form.weight.shape[0]
    places = torch.tensor([first_blocks(widths, _ROWS), [*widths, 0]], dtype=torch.int64)
    aligned = math.gcd(16, *packed.addresses.reshape(-1).tolist())
    counts, addresses, factors, (where,) = packed.sent(device, [places])
    return DenseTable(counts, addresses[0], factors, where, tuple(widths), aligned)


def add_dense(
    ys: Sequence[torch.Tensor], x: torch.Tensor, table: DenseTable, segments: Segments
) -> None:
    """`y_p[t] += s[t] * sum_i factor_i x[t] D_pi^T` over the deltas of part p, t's slot.

    Args:
        ys: an output `[T, N_p]` for each part, changed in place; tokens of the base are not touched.
        x: `[T, M]` of the same dtype.
        table: the deltas by part and slot.
        segments: which slot each token has.
    """
    assert all(x.dtype == y.dtype for y in ys), x.dtype
    assert x.stride(1) == 1, "rows must be contiguous"
    parts, slots, entries = table.factors.shape
    blocks = first_blocks(table.widths, _ROWS)[-1]
    if not segments.tiles or not blocks:
        return
    columns, wide = x.shape[1], columns_for(x.dtype)
    scaled = segments.scales is not None
    held, strides = outputs(ys)
    with on(x.device):
        multiply[(blocks, segments.tiles)](
            x, *held, segments.order, segments.slot, segments.start, segments.length,
            table.addresses, table.factors, table.counts,
            segments.scales if scaled else segments.order, *table.places.unbind(0), slots,
            columns, x.stride(0), *strides,
            BT=segments.block, BN=_ROWS, BK=wide, ENTRIES=entries,
            STEPS=triton.cdiv(columns, wide), SCALED=scaled, ALIGNED=table.aligned,
            COMPUTE=compute_type(x.dtype), PARTS=parts, **warps_for(segments.block, x.dtype),
        )  # fmt: skip
