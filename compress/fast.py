"""The inner loops of packing, in C where this machine can have it and in torch elsewhere.

Both give the same bits: sums of magnitudes run over 16 accumulators in column order, folded in
halves, so that scales do not depend on a library's order of summation.
"""

from __future__ import annotations

import ctypes
import math
import threading
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import torch

from deltafold.compress import bits
from deltafold.compress.dtypes import raw_bytes
from deltafold.compress.native import compiled

_LANES: Final = 16
_DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


#: By name, what `scratch` has lent to this thread.
_lent = threading.local()


class Totals(NamedTuple):
    """Sums over a difference `d` and what is left of it, `r`."""

    magnitude: float
    square: float
    rest: float
    largest: float
    changed: int


@cache
def fast_library() -> ctypes.CDLL | None:
    """The compiled `fast.c`, or None where this machine cannot have it."""
    library = compiled(Path(__file__).with_name("fast.c"))
    if library is None:
        return None
    pointer, integer, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.difference.restype = None
    library.difference.argtypes = [pointer, kind, pointer, kind, pointer, integer]
    library.magnitude_sums.restype = None
    library.magnitude_sums.argtypes = [pointer, integer, integer, integer, pointer]
    library.take_plane.restype = None
    library.take_plane.argtypes = [
        pointer, integer, integer, integer, pointer, kind, pointer
    ]  # fmt: skip
    library.add_plane.restype = None
    library.add_plane.argtypes = library.take_plane.argtypes
    library.square_sum.restype = ctypes.c_double
    library.square_sum.argtypes = [pointer, kind, integer]
    library.planes_error.restype = ctypes.c_double
    library.planes_error.argtypes = [
        pointer, integer, integer, integer, integer, pointer, kind, pointer
    ]  # fmt: skip
    library.rows_changed.restype = None
    library.rows_changed.argtypes = [pointer, pointer, integer, integer, pointer]
    library.totals.restype = None
    library.totals.argtypes = [pointer, pointer, integer, pointer]
    return library


def difference(
    variant: torch.Tensor, base: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`variant - base` in float32.

    Args:
        variant: floating point, any shape.
        base: of the same shape and any dtype; None counts as zero.
        out: float32 and contiguous, of that shape, to be filled. New memory is costlier than the
            subtraction itself, so who has many tensors to go through lends the same again.
    """
    library = fast_library()
    known = variant.dtype in _DTYPES and (base is None or base.dtype in _DTYPES)
    if library is None or not known:
        wide = variant.to(torch.float32)
        wide = wide.clone() if base is None else wide - base.to(torch.float32)
        return wide if out is None else out.copy_(wide)
    variant = variant.contiguous()
    base = None if base is None else base.contiguous()
    out = torch.empty(variant.shape, dtype=torch.float32) if out is None else out
    assert out.is_contiguous()
    assert out.shape == variant.shape
    library.difference(
        None if base is None else base.data_ptr(),
        0 if base is None else _DTYPES[base.dtype],
        variant.data_ptr(),
        _DTYPES[variant.dtype],
        out.data_ptr(),
        out.numel(),
    )
    return out


def magnitude_sums(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """Sums of |x| over groups of columns.

    Args:
        matrix: float32 `[N, M]`.
        width: columns of a group.

    Returns:
        float32 `[N, ceil(M / width)]`.
    """
    rows, columns = matrix.shape
    groups = -(-columns // width)
    if not matrix.numel():
        return torch.zeros(rows, groups)
    library = fast_library()
    if library is None:
        return _portable_sums(matrix.abs(), width, groups)
    matrix = matrix.contiguous()
    out = torch.empty(rows, groups)
    library.magnitude_sums(matrix.data_ptr(), rows, columns, width, out.data_ptr())
    return out


def take_plane(rest: torch.Tensor, levels: torch.Tensor, width: int) -> torch.Tensor:
    """Take one sign plane off a matrix: `rest -= level * sign(rest)`, in place.

    Args:
        rest: float32 `[N, M]`, contiguous.
        levels: float32 `[N, ceil(M / width)]`, or a single level (0-d or `[1]`).
        width: columns of a group.

    Returns:
        uint8 `[N, ceil(M / 8)]`, the signs' bits, low bits first; a zero counts as plus.
    """
    assert rest.is_contiguous()
    rows, columns = rest.shape
    levels = levels.contiguous()
    library = fast_library()
    if library is None or not rest.numel():
        plus = rest >= 0
        if levels.dim() == 2:
            spread = levels.repeat_interleave(width, dim=1)[:, :columns]
        else:
            spread = levels.reshape(1, 1)
        rest -= torch.where(plus, spread, -spread)
        return bits.pack(plus.to(torch.uint8), 1)
    signs = torch.empty(rows, bits.packed_width(columns, 1), dtype=torch.uint8)
    library.take_plane(
        rest.data_ptr(), rows, columns, width, levels.data_ptr(), int(levels.dim() == 2),
        signs.data_ptr(),
    )  # fmt: skip
    return signs


def add_plane(total: torch.Tensor, signs: torch.Tensor, levels: torch.Tensor, width: int) -> None:
    """Put one sign plane back: `total += level * sign`, in place.

    Args:
        total: float32 `[N, M]`, contiguous.
        signs: uint8 `[N, ceil(M / 8)]`, as `take_plane` gives them.
        levels: float32 `[N, ceil(M / width)]`, or a single level (0-d or `[1]`).
        width: columns of a group.
    """
    assert total.is_contiguous()
    rows, columns = total.shape
    levels, signs = levels.contiguous(), signs.contiguous()
    library = fast_library()
    if library is None or not total.numel() or levels.requires_grad:
        plus = bits.unpack(signs, 1, columns).bool()
        if levels.dim() == 2:
            spread = levels.repeat_interleave(width, dim=1)[:, :columns]
        else:
            spread = levels.reshape(1, 1)
        total += torch.where(plus, spread, -spread)
        return
    library.add_plane(
        total.data_ptr(), rows, columns, width, levels.data_ptr(), int(levels.dim() == 2),
        signs.data_ptr(),
    )  # fmt: skip


def square_sum(tensor: torch.Tensor) -> float:
    """The sum of squares of a floating-point tensor."""
    library = fast_library()
    if library is None or tensor.dtype not in _DTYPES:
        return float(tensor.double().square().sum())
    tensor = tensor.contiguous()
    return float(library.square_sum(tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.numel()))


def planes_error(
    delta: torch.Tensor, signs: torch.Tensor, levels: torch.Tensor, width: int
) -> float:
    """The sum of squares of what sign planes miss of a matrix, read back from their bits.

    Args:
        delta: float32 `[N, M]`.
        signs: uint8 `[planes, N, ceil(M / 8)]`.
        levels: float32 `[planes, N, ceil(M / width)]`, or `[planes]`.
        width: columns of a group.
    """
    rows, columns = delta.shape
    library = fast_library()
    if library is None or not delta.numel():
        total = torch.zeros(rows, columns)
        for plane, level in zip(signs, levels, strict=True):
            add_plane(total, plane, level, width)
        return square_sum(delta - total)
    delta, signs, levels = delta.contiguous(), signs.contiguous(), levels.contiguous()
    return float(
        library.planes_error(
            delta.data_ptr(), rows, columns, width, len(signs), levels.data_ptr(),
            int(levels.dim() == 3), signs.data_ptr(),
        )
    )  # fmt: skip


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory that this thread lends again and again: new memory costs more than the work in it.

    What it holds is lost when the same name is asked for again, so it must not be kept.
    """
    count = math.prod(shape) * dtype.itemsize
    lent: dict[str, torch.Tensor] = _lent.__dict__
    if name not in lent or lent[name].numel() < count:
        lent[name] = torch.empty(count, dtype=torch.uint8)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return lent[name][:count].view(dtype).reshape(shape)


def forget() -> None:
    """Give this thread's scratch memory back."""
    _lent.__dict__.clear()


def rows_changed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """bool `[N]`: which rows of two matrices `[N, M]` of one dtype differ in any bit."""
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    rows, columns = first.shape
    library = fast_library()
    if library is None or not first.numel():
        width = columns * first.element_size()
        ours, theirs = (raw_bytes(t).reshape(rows, width) for t in (first, second))
        return (ours != theirs).any(dim=1)
    first, second = first.contiguous(), second.contiguous()
    changed = torch.empty(rows, dtype=torch.bool)
    width = columns * first.element_size()
    library.rows_changed(first.data_ptr(), second.data_ptr(), rows, width, changed.data_ptr())
    return changed


def totals(difference: torch.Tensor, rest: torch.Tensor | None = None) -> Totals:
    """Sums over a float32 difference, and over what a codec missed of it."""
    library = fast_library()
    if library is None:
        left = difference.new_zeros(()) if rest is None else rest
        return Totals(
            magnitude=float(difference.abs().sum(dtype=torch.float64)),
            square=float(difference.double().square().sum()),
            rest=float(left.double().square().sum()),
            largest=float(difference.abs().amax()) if difference.numel() else 0.0,
            changed=int((difference != 0).sum()),
        )
    difference = difference.contiguous()
    rest = None if rest is None else rest.contiguous()
    out = torch.zeros(5, dtype=torch.float64)
    library.totals(
        difference.data_ptr(), None if rest is None else rest.data_ptr(), difference.numel(),
        out.data_ptr(),
    )  # fmt: skip
    magnitude, square, left_over, largest, changed = out.tolist()
    return Totals(magnitude, square, left_over, largest, int(changed))


def _portable_sums(magnitudes: torch.Tensor, width: int, groups: int) -> torch.Tensor:
    rows, columns = magnitudes.shape
    pad = torch.nn.functional.pad
    padded = pad(magnitudes, (0, groups * width - columns)).reshape(rows, groups, width)
    padded = pad(padded, (0, -width % _LANES))
    lanes = torch.zeros(rows, groups, _LANES)
    for start in range(0, padded.shape[2], _LANES):
        lanes += padded[:, :, start : start + _LANES]
    half = _LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]
