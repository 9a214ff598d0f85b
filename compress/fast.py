"""The inner loops of packing, in C where this machine can have it and in torch elsewhere.

Both give the same bits. Sums run over 16 float32 accumulators in column order, folded in halves, so
that scales do not depend on a library's order of summation; 4096 columns of a row at a time are added
up like that, and these sums in float64, one after the other.

Loops take a `Pair`, the rows of both models as they are on disk: a difference that is written out is
twice as large as they are, and reading and writing memory is what these loops wait for.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from deltafold.compress.dtypes import raw_bytes
from deltafold.compress.native import FLAGS, compiled

_LANES: Final = 16
_CHUNK: Final = 4096
_DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Sums of squares below this may have lost some to the bottom of float32's range.
_UNSURE: Final = 1e-30


class _Rows(ctypes.Structure):
    """`Pair` as C takes it."""

    _fields_ = (
        ("variant", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("variant_dtype", ctypes.c_int32),
        ("base_dtype", ctypes.c_int32),
    )


class Pair(NamedTuple):
    """Rows of a fine-tune's matrix `[N, M]` and of its base's; without a base it counts as zero."""

    variant: torch.Tensor
    base: torch.Tensor | None = None

    @classmethod
    def of(cls, variant: torch.Tensor, base: torch.Tensor | None = None) -> Pair:
        """A pair that loops can take: contiguous, and float32 where C does not know the dtype."""
        return cls(_known(variant), None if base is None else _known(base))

    def delta(self) -> torch.Tensor:
        """The difference, float32 `[N, M]`."""
        return difference(self.variant, self.base)

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, M)`."""
        rows, columns = self.variant.shape
        return rows, columns

    def for_c(self) -> Any:
        """By reference, to be given to a function at once; the pair must be kept meanwhile."""
        variant, base = self
        assert variant.is_contiguous()
        assert base is None or (base.is_contiguous() and base.shape == variant.shape)
        rows = _Rows(
            variant.data_ptr(), None if base is None else base.data_ptr(), *variant.shape,
            _DTYPES[variant.dtype], 0 if base is None else _DTYPES[base.dtype],
        )  # fmt: skip
        return ctypes.byref(rows)


class Totals(NamedTuple):
    """Sums over a difference `d` and over its base."""

    magnitude: float = 0.0
    square: float = 0.0
    largest: float = 0.0
    changed: int = 0
    base_square: float = 0.0


def library_of(name: str, signatures: dict[str, tuple[Any, Sequence[Any]]]) -> ctypes.CDLL | None:
    """A C file beside this one, compiled, or None where this machine cannot have it.

    Args:
        name: of the file, without its ending.
        signatures: result and arguments of each function.
    """
    library = compiled(Path(__file__).with_name(f"{name}.c"), (*FLAGS, "-mbmi2"))
    if library is None:
        return None
    for function, (result, arguments) in signatures.items():
        entry = getattr(library, function)
        entry.restype, entry.argtypes = result, list(arguments)
    return library


@cache
def fast_library() -> ctypes.CDLL | None:
    """The compiled `fast.c`, or None where this machine cannot have it."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    return library_of(
        "fast",
        {
            "difference": (None, [pointer, pointer]),
            "rows_changed": (None, [pointer, pointer, integer, integer, pointer]),
            "totals": (None, [pointer, pointer]),
        },
    )


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
    if library is None or not known or not variant.is_cpu:
        wide = variant.to(torch.float32)
        wide = wide.clone() if base is None else wide - base.to(torch.float32)
        return wide if out is None else out.copy_(wide)
    out = torch.empty(variant.shape, dtype=torch.float32) if out is None else out
    assert out.is_contiguous()
    assert out.shape == variant.shape
    flat = Pair.of(variant.reshape(1, -1), None if base is None else base.reshape(1, -1))
    library.difference(flat.for_c(), out.data_ptr())
    return out


def totals(pair: Pair) -> Totals:
    """Sums over the difference of a pair, and the sum of the base's squares."""
    library = fast_library()
    if not pair.variant.numel():
        return Totals()
    if library is None or not pair.variant.is_cpu:
        found = _portable_totals(pair)
    else:
        out = (ctypes.c_double * 5)()
        library.totals(pair.for_c(), ctypes.addressof(out))
        found = Totals(out[0], out[1], out[2], int(out[3]), out[4])
    if found.changed and not is_sure(found.square):
        # Squares in float32 overflow early, and are nothing early.
        found = found._replace(square=_exact_squares(pair.delta()))
    return found


def is_sure(square: float) -> bool:
    """Whether a sum of squares of float32 numbers neither overflowed nor sank below them."""
    return math.isfinite(square) and square > _UNSURE


def square_sum(matrix: torch.Tensor) -> float:
    """The sum of squares of a float32 matrix `[N, M]`."""
    return totals(Pair.of(matrix)).square


def rows_changed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """bool `[N]`: which rows of two matrices `[N, M]` of one dtype differ in any bit."""
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    rows, columns = first.shape
    library = fast_library()
    if library is None or not first.numel() or not first.is_cpu:
        width = columns * first.element_size()
        ours, theirs = (raw_bytes(t).reshape(rows, width) for t in (first, second))
        return (ours != theirs).any(dim=1)
    first, second = first.contiguous(), second.contiguous()
    changed = torch.empty(rows, dtype=torch.bool)
    width = columns * first.element_size()
    library.rows_changed(first.data_ptr(), second.data_ptr(), rows, width, changed.data_ptr())
    return changed


def group_sums(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """Sums of a float32 matrix `[N, M]` over groups of columns, in the loops' own order.

    Returns:
        float32 `[N, ceil(M / width)]`.
    """
    rows, columns = matrix.shape
    groups = -(-columns // width)
    pad = torch.nn.functional.pad
    padded = pad(matrix, (0, groups * width - columns)).reshape(rows, groups, width)
    padded = pad(padded, (0, -width % _LANES))
    lanes = matrix.new_zeros(rows, groups, _LANES)
    for start in range(0, padded.shape[2], _LANES):
        lanes += padded[:, :, start : start + _LANES]
    half = _LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


def total_of(matrix: torch.Tensor) -> float:
    """The sum of a float32 matrix `[N, M]`, in the loops' own order."""
    sums = group_sums(matrix, min(_CHUNK, max(matrix.shape[1], 1))).double().reshape(-1)
    # Not `sum`, which adds in an order of its own.
    return float(np.add.accumulate(sums.cpu().numpy())[-1]) if len(sums) else 0.0


def _portable_totals(pair: Pair) -> Totals:
    delta, base = pair.delta(), pair.base
    magnitudes = delta.abs()
    return Totals(
        magnitude=total_of(magnitudes),
        square=total_of(delta.square()),
        largest=float(magnitudes.amax()),
        changed=int((delta != 0).sum()),
        base_square=0.0 if base is None else total_of(base.to(torch.float32).square()),
    )


def _exact_squares(delta: torch.Tensor) -> float:
    return float(np.add.accumulate(delta.double().square().reshape(-1).cpu().numpy())[-1])


def _known(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor if tensor.dtype in _DTYPES else tensor.to(torch.float32)).contiguous()
