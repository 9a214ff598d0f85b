"""Sign planes of the difference between two models: the loops in C, and the same in torch."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from deltafold.compress import bits
from deltafold.compress.fast import Pair, group_sums, library_of, total_of


@cache
def planes_library() -> ctypes.CDLL | None:
    """The compiled `fast_planes.c`, or None where this machine cannot have it."""
    pointer, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    planes = [pointer, integer, integer, pointer, flag, pointer]
    return library_of(
        "fast_planes",
        {
            "plane_of": (None, [*planes, pointer]),
            "planes_missed": (ctypes.c_double, planes),
            "add_plane": (None, [pointer, integer, integer, integer, pointer, flag, pointer]),
        },
    )


def take_plane(pair: Pair, width: int, levels: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The next plane of a difference: the signs of what the planes before it leave.

    What they leave is made anew from both models for each plane, row by row, and never written.

    Args:
        pair: `[N, M]`.
        width: columns of a group.
        levels: float32 `[P, N, ceil(M / width)]` or `[P]`: of the P planes before.
        signs: uint8 `[planes, N, ceil(M / 8)]`; P planes are filled and the next one is written: bits,
            low ones first, 1 for plus. A zero counts as plus.

    Returns:
        float32 `[N, ceil(M / width)]`: sums of the magnitudes of what is left.
    """
    rows, columns = pair.shape
    before, library = len(levels), planes_library()
    sums = pair.variant.new_zeros(rows, -(-columns // width), dtype=torch.float32)
    if not rows * columns:
        return sums
    if library is None or not signs.is_cpu:
        rest = pair.delta()
        for plane in range(before):
            rest = rest - _spread(signs[plane], levels[plane], width, columns)
        signs[before] = bits.pack((rest >= 0).to(torch.uint8), 1)
        return group_sums(rest.abs(), width)
    levels = levels.contiguous()
    assert signs.is_contiguous()
    library.plane_of(
        pair.for_c(), width, before, levels.data_ptr(), int(levels.dim() == 3), signs.data_ptr(),
        sums.data_ptr(),
    )  # fmt: skip
    return sums


def planes_missed(pair: Pair, width: int, levels: torch.Tensor, signs: torch.Tensor) -> float:
    """The sum of squares of what sign planes miss of a difference, read back from their bits.

    Args:
        pair: `[N, M]`.
        width: columns of a group.
        levels: float32 `[planes, N, ceil(M / width)]` or `[planes]`.
        signs: uint8 `[planes, N, ceil(M / 8)]`.
    """
    rows, columns = pair.shape
    library = planes_library()
    if not rows * columns:
        return 0.0
    if library is None or not signs.is_cpu:
        total = levels.new_zeros(rows, columns)
        for plane, level in zip(signs, levels, strict=True):
            total += _spread(plane, level, width, columns)
        return total_of((pair.delta() - total).square())
    signs, levels = signs.contiguous(), levels.contiguous()
    found = library.planes_missed(
        pair.for_c(), width, len(signs), levels.data_ptr(), int(levels.dim() == 3),
        signs.data_ptr(),
    )  # fmt: skip
    return float(found)


def add_plane(total: torch.Tensor, signs: torch.Tensor, levels: torch.Tensor, width: int) -> None:
    """Put one sign plane back: `total += level * sign`, in place.

    Args:
        total: float32 `[N, M]`, contiguous.
        signs: uint8 `[N, ceil(M / 8)]`, as `take_plane` writes them.
        levels: float32 `[N, ceil(M / width)]`, or a single level (0-d).
        width: columns of a group.
    """
    assert total.is_contiguous()
    rows, columns = total.shape
    levels, signs = levels.contiguous(), signs.contiguous()
    library = planes_library()
    if library is None or not total.numel() or levels.requires_grad or not total.is_cpu:
        total += _spread(signs, levels, width, columns)
        return
    library.add_plane(
        total.data_ptr(), rows, columns, width, levels.data_ptr(), int(levels.dim() == 2),
        signs.data_ptr(),
    )  # fmt: skip


def _spread(signs: torch.Tensor, levels: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """Plus and minus a plane's levels, float32 `[N, M]`."""
    plus = bits.unpack(signs, 1, columns).bool()
    if levels.dim() == 2:
        each = levels.repeat_interleave(width, dim=1)[:, :columns]
    else:
        each = levels.reshape(1, 1)
    return torch.where(plus, each, -each)
