"""Uniform codes of the difference between two models: the loops in C, and the same in torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch

from deltafold.compress import bits as packing
from deltafold.compress.fast import Pair, group_sums, library_of, total_of


@cache
def grid_library() -> ctypes.CDLL | None:
    """The compiled `fast_grid.c`, or None where this machine cannot have it."""
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    grid = [pointer, integer, number, pointer]
    values = [pointer, integer, integer, integer, number, pointer, pointer]
    return library_of(
        "fast_grid",
        {
            "grid_scales": (number, [*grid, integer, pointer]),
            "grid_codes": (number, [*grid, pointer]),
            "grid_missed": (ctypes.c_double, [*grid, pointer]),
            "grid_values": (number, values),
        },
    )


def best_scales(pair: Pair, width: int, bits: int, shares: Sequence[float]) -> torch.Tensor:
    """Of each group's scales, tried as shares of its peak, the one whose codes miss least.

    Args:
        pair: `[N, M]`, finite.
        width: columns of a group.
        bits: of a code.
        shares: at least one; a scale is the entry of largest magnitude times a share. Of equally good
            ones, and of equally large entries, the first counts.

    Returns:
        float32 `[N, ceil(M / width)]`.
    """
    rows, columns = pair.shape
    library = grid_library()
    out = pair.variant.new_zeros(rows, -(-columns // width), dtype=torch.float32)
    if not out.numel():
        return out
    if library is None or not out.is_cpu:
        return _portable_scales(_groups(pair.delta(), width), bits, shares)
    tried = torch.tensor(shares, dtype=torch.float32)
    if library.grid_scales(pair.for_c(), width, bits, tried.data_ptr(), len(tried), out.data_ptr()):
        raise MemoryError
    return out


def codes(pair: Pair, width: int, bits: int, scales: torch.Tensor) -> torch.Tensor:
    """A difference as codes `round(d / scale) + 2**(bits - 1)`, clamped to the grid.

    Args:
        pair: `[N, M]`, finite.
        width: columns of a group.
        bits: of a code.
        scales: float32 `[N, ceil(M / width)]`.

    Returns:
        uint8 `[N, ceil(M * bits / 8)]`, low bits first.
    """
    rows, columns = pair.shape
    library = grid_library()
    out = pair.variant.new_empty(rows, packing.packed_width(columns, bits), dtype=torch.uint8)
    if not out.numel():
        return out
    if library is None or not out.is_cpu:
        levels = _levels(_groups(pair.delta(), width), scales.unsqueeze(-1), bits)
        found = (levels + 2 ** (bits - 1)).to(torch.uint8).reshape(rows, -1)[:, :columns]
        return packing.pack(found.contiguous(), bits)
    scales = scales.contiguous()
    if library.grid_codes(pair.for_c(), width, bits, scales.data_ptr(), out.data_ptr()):
        raise MemoryError
    return out


def codes_missed(
    pair: Pair, width: int, bits: int, scales: torch.Tensor, packed: torch.Tensor
) -> float:
    """The sum of squares of what codes miss of a difference, read back from their bits."""
    rows, columns = pair.shape
    library = grid_library()
    if not rows * columns:
        return 0.0
    if library is None or not packed.is_cpu:
        missed = pair.delta() - values(packed, columns, width, bits, scales)
        return total_of(missed.square())
    scales, packed = scales.contiguous(), packed.contiguous()
    found = library.grid_missed(pair.for_c(), width, bits, scales.data_ptr(), packed.data_ptr())
    if found < 0:
        raise MemoryError
    return float(found)


def values(
    packed: torch.Tensor, columns: int, width: int, bits: int, scales: torch.Tensor
) -> torch.Tensor:
    """What codes stand for: float32 `[N, M]`.

    Args:
        packed: as `codes` gives them.
        columns: M.
        width: columns of a group.
        bits: of a code.
        scales: float32 `[N, ceil(M / width)]`; gradients flow to them.
    """
    rows, library = len(packed), grid_library()
    if library is None or not rows * columns or scales.requires_grad or not packed.is_cpu:
        centred = packing.unpack(packed, bits, columns).to(torch.int16) - 2 ** (bits - 1)
        found: torch.Tensor = centred.to(torch.float32) * spread(scales, width, columns)
        return found
    scales, packed = scales.contiguous(), packed.contiguous()
    out = torch.empty(rows, columns)
    if library.grid_values(
        packed.data_ptr(), rows, columns, width, bits, scales.data_ptr(), out.data_ptr()
    ):
        raise MemoryError
    return out


def spread(scales: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """Scales `[N, groups]` as they broadcast to `[N, M]`."""
    if scales.shape[1] <= 1:
        return scales
    return scales.repeat_interleave(width, dim=1)[:, :columns]


def _groups(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """`[N, M]` as `[N, groups, width]`, zeros behind the last column."""
    rows, columns = matrix.shape
    groups = -(-columns // width)
    padded = torch.nn.functional.pad(matrix, (0, groups * width - columns))
    return padded.reshape(rows, groups, width)


def _levels(groups: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(groups / safe).clamp(-half, half - 1)


def _portable_scales(groups: torch.Tensor, bits: int, shares: Sequence[float]) -> torch.Tensor:
    rows, count, width = groups.shape
    peak = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    best, least = torch.zeros_like(peak), torch.full_like(peak, torch.inf)
    for share in shares:
        scale = peak * share
        error = groups - _levels(groups, scale.unsqueeze(-1), bits) * scale.unsqueeze(-1)
        loss = group_sums(error.square().reshape(rows * count, width), width).reshape(rows, count)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best
