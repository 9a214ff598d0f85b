"""Low rank: `D ~ B A`, the best of its rank by Eckart and Young, each factor holding sqrt(S).

`y += (x A^T) B^T` is the form that LoRA servers apply.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from deltafold.compress.terms import scales
from deltafold.compress.terms.base import (
    Checked,
    Context,
    Encoded,
    Parts,
    PartSpec,
    register,
    rows_and_columns,
)

#: Above this the Gram matrix is decomposed instead of the matrix itself: one side squared is small.
_DIRECT = 1024


@register
@dataclass(frozen=True)
class LowRank(Checked):
    """Truncated singular value decomposition.

    Parts: `a` `[rank, M]`, `b` `[N, rank]`, and their `*_unit` for float16.
    """

    id: ClassVar[str] = "lowrank"
    version: ClassVar[int] = 1

    rank: int = 16
    factor_format: str = "float16"

    def __post_init__(self) -> None:
        self._require(self.rank >= 1, f"rank must be at least 1, not {self.rank}")
        self._require(self.factor_format in scales.FORMATS, "factor_format: float32 or float16")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """The leading factors of a float32 delta; the rank is capped by the shape."""
        matrix = delta.reshape(rows_and_columns(tuple(delta.shape)))
        rank = max(min(self.rank, *matrix.shape), 1)
        left, singular, right = truncated_svd(matrix, rank)
        root = singular.sqrt()
        a = scales.store(root.unsqueeze(1) * right, self.factor_format, "a")
        b = scales.store(left * root, self.factor_format, "b")
        return Encoded(replace(self, rank=rank), {**a, **b})

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """`B A`, float32 of `shape`."""
        a, b = self.factors(parts)
        return (b @ a).reshape(shape)

    def factors(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 `a [rank, M]` and `b [N, rank]`."""
        stored = dict(parts)
        return (
            scales.load(stored, self.factor_format, "a"),
            scales.load(stored, self.factor_format, "b"),
        )

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        rows, columns = rows_and_columns(shape)
        rank = max(min(self.rank, rows, columns), 1)
        return {
            **scales.specs((rank, columns), self.factor_format, "a"),
            **scales.specs((rows, rank), self.factor_format, "b"),
        }


def truncated_svd(
    matrix: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular triplets of a float32 matrix `[N, M]`.

    Returns:
        `U [N, rank]`, `S [rank]`, `V^T [rank, M]`, float32.
    """
    rows, columns = matrix.shape
    if matrix.numel() == 0:
        zeros = matrix.new_zeros
        return zeros(rows, rank), zeros(rank), zeros(rank, columns)
    if min(rows, columns) <= _DIRECT:
        left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank].contiguous(), singular[:rank], right[:rank].contiguous()
    if rows > columns:
        left_t, singular, right_t = truncated_svd(matrix.T, rank)
        return right_t.T.contiguous(), singular, left_t.T.contiguous()
    # Squaring halves the digits, so the Gram matrix is decomposed in float64.
    wide = matrix.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors[:, -rank:].flip(-1)
    singular = values[-rank:].flip(-1).clamp_min(0).sqrt()
    right = (left.T @ wide) / singular.clamp_min(1e-300).unsqueeze(1)
    return left.float().contiguous(), singular.float(), right.float().contiguous()
