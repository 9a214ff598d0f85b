"""Layers that read the same input, applied by one launch: each is a *part* with an output of its own.

Blocks of rows are numbered through all parts. A kernel finds the part of its block in a small table of
first blocks, and the part's output among up to four addresses. Outputs may be tensors of their own
(q, k and v of the embedded engine) or column ranges of one merged tensor (vLLM's merged linears).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl

#: Parts of one launch.
MOST_PARTS: Final = 4


@triton.jit
def part_of(block, first, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    # The part that a block of rows belongs to; `first` int32 [PARTS + 1].
    part = block * 0
    for i in tl.static_range(1, PARTS):
        part += (block >= tl.load(first + i)).to(tl.int32)
    return part


@triton.jit
def chosen(part, a, b, c, d, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    # The part's own of up to four addresses or strides.
    found = a
    if PARTS > 1:
        found = tl.where(part == 1, b, found)
    if PARTS > 2:
        found = tl.where(part == 2, c, found)
    if PARTS > 3:
        found = tl.where(part == 3, d, found)
    return found


def outputs(ys: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """Addresses and strides of up to four outputs `[T, N]`, as kernels take them."""
    assert 0 < len(ys) <= MOST_PARTS, len(ys)
    assert all(y.stride(1) == 1 for y in ys), "rows must be contiguous"
    filled = [*ys, *[ys[0]] * (MOST_PARTS - len(ys))]
    return filled, [y.stride(0) for y in filled]


def first_blocks(widths: Sequence[int], block: int) -> list[int]:
    """First block of each part, and how many there are in all."""
    first = [0]
    for width in widths:
        first.append(first[-1] + -(-width // block))
    return first
