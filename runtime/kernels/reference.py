"""The contract in plain torch: a dense delta. Slow on memory, right by construction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltafold.compress.terms import Context, Encoded


@dataclass(frozen=True)
class Dense:
    """D as `[N, M]` in the model's dtype; what any representation can be rebuilt to."""

    weight: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.weight.numel() * self.weight.element_size()

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`."""
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        return self.weight.index_select(0, index)


@dataclass(frozen=True)
class RowSubset:
    """A delta that is zero outside some rows, which another form holds as `[rows, M]`."""

    index: torch.Tensor
    inner: Dense
    rows: int

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.inner.nbytes + self.index.numel() * self.index.element_size()

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`."""
        out = x.new_zeros(x.shape[0], self.rows)
        return out.index_copy_(1, self.index, self.inner.matmul(x))

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        place = torch.searchsorted(self.index, index).clamp_max(max(len(self.index) - 1, 0))
        if not len(self.index):
            return self.inner.weight.new_zeros(len(index), self.inner.weight.shape[1])
        found = self.index[place] == index
        return self.inner.gather(place) * found.unsqueeze(1)


def dense_delta(encoded: list[Encoded], shape: tuple[int, ...], context: Context) -> torch.Tensor:
    """The decoded sum of terms, float32 of `shape`."""
    total = torch.zeros(shape)
    for term, parts in encoded:
        total += term.decode(parts, shape, context)
    return total
