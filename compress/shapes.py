"""Tensors read as matrices."""

from __future__ import annotations


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """`(N, M)` of a tensor read as a matrix, by its shape alone; part of the format.

    1-D is one row. A 3-D tensor whose last dimension is at least 32 is a stack of matrices (fused
    experts `[E, N, M]`): `(E * N, M)`. Anything else of more than two dimensions (convolutions) is
    `(first, product of the rest)`.
    """
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    if len(shape) == 3 and shape[2] >= 32:
        return shape[0] * shape[1], shape[2]
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], columns
