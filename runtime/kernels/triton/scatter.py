"""Sparse deltas back to dense: each entry put to its place, on the base's weight or on zero."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from deltafold.runtime.kernels.triton.launch import on

#: Entries of each row that one block of threads takes: enough blocks for a few rows, few for many.
_ENTRIES: Final = 64


@triton.jit
def scatter(  # type: ignore[no-untyped-def]
    out, base, places, values, starts, levels, rows, columns, base_stride,
    OF: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    BASED: tl.constexpr,
):  # fmt: skip
    # STEP entries of each of BLOCK rows. A row has at most one entry that is not zero at a column, and
    # those that fill lists up are zero: nobody writes where another does.
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    row = (block * BLOCK + lane)[None, :]
    first = tl.load(starts + block)
    entry = first + tl.program_id(1) * STEP + tl.arange(0, STEP)
    some = (entry < tl.load(starts + block + 1))[:, None] & (row < rows)
    where = entry.to(tl.int64)[:, None] * BLOCK + lane[None, :]
    raw = tl.load(places + where, mask=some, other=0).to(tl.int32)
    if OF > 0:
        column = (entry - first)[:, None] * OF + (raw & 15)
        number = ((raw >> 4) - HALF).to(tl.float32)
    else:
        column = raw & 0xFFFF
        number = tl.load(values + where, mask=some, other=0.0).to(tl.float32)
    kept = some & (number != 0) & (column < columns)
    number *= tl.load(levels + row)
    if BASED:
        known = base + row.to(tl.int64) * base_stride + column
        number += tl.load(known, mask=kept, other=0.0).to(tl.float32)
    target = out + row.to(tl.int64) * columns + column
    tl.store(target, number.to(out.dtype.element_ty), mask=kept)


def scattered(
    places: torch.Tensor,
    values: torch.Tensor | None,
    starts: torch.Tensor,
    levels: torch.Tensor,
    shape: tuple[int, int],
    layout: tuple[int, int],
    dtype: torch.dtype,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """A sparse delta, or base and delta rounded once from their float32 sum: `[N, M]` of `dtype`.

    Args:
        places: as `SparseRows` has it, like the next three.
        values: float16 `[entries, 32]`, or None.
        starts: int32 `[blocks + 1]`.
        levels: float32 `[blocks * 32]`.
        shape: N and M.
        layout: columns of a stratum and the code that means zero; 0 and 0 for lists.
        dtype: of the result.
        base: `[N, M]` to add, or None.
    """
    rows, columns = shape
    assert base is None or (base.shape == shape and base.stride(1) == 1), shape
    out = torch.empty(shape, dtype=dtype, device=places.device)
    if base is None:
        out.zero_()
    else:
        out.copy_(base)
    blocks, block = len(starts) - 1, places.shape[1]
    # A block of rows has at most an entry a column; how many it has, only the device knows.
    steps = triton.cdiv(len(places), _ENTRIES)
    if not steps:
        return out
    of, half = layout
    longest = columns if not of else triton.cdiv(columns, of)
    with on(out.device):
        scatter[(blocks, min(steps, triton.cdiv(longest, _ENTRIES)))](
            out, out if base is None else base, places, places if values is None else values,
            starts, levels, rows, columns, 0 if base is None else base.stride(0),
            OF=of, HALF=half, BLOCK=block, STEP=_ENTRIES, BASED=base is not None,
        )  # fmt: skip
    return out
