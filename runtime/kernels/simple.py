"""Forms that plain torch applies well on any device: sparse and low rank."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Csr:
    """A sparse delta as compressed rows, float32 (torch's CPU product has no half precision)."""

    matrix: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        parts = (self.matrix.values(), self.matrix.crow_indices(), self.matrix.col_indices())
        return sum(p.numel() * p.element_size() for p in parts)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`."""
        return (self.matrix @ x.to(torch.float32).T).T.to(x.dtype)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D, dense float32."""
        starts = self.matrix.crow_indices()[index].long()
        counts = self.matrix.crow_indices()[index + 1].long() - starts
        out = torch.zeros(len(index), self.matrix.shape[1], device=index.device)
        row = torch.repeat_interleave(torch.arange(len(index), device=index.device), counts)
        # Entry j of output row i lies at starts[i] + j.
        within = torch.arange(len(row), device=index.device) - (counts.cumsum(0) - counts)[row]
        place = starts[row] + within
        out[row, self.matrix.col_indices()[place].long()] = self.matrix.values()[place]
        return out


def csr(delta: torch.Tensor, device: torch.device) -> Csr:
    """A dense float32 `[N, M]` delta with many zeros as compressed rows."""
    with warnings.catch_warnings():
        # torch warns once a process that this layout is in beta.
        warnings.simplefilter("ignore", UserWarning)
        return Csr(delta.to_sparse_csr().to(device))


@dataclass(frozen=True)
class Factors:
    """Low rank: `a [r, M]`, `b [N, r]` in the model's dtype."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.a, self.b))

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`, by way of `[k, r]`."""
        linear = torch.nn.functional.linear
        return linear(linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        return self.b.index_select(0, index) @ self.a


@dataclass(frozen=True)
class ColumnSubset:
    """A delta that is zero outside some columns: `weight [N, count]` in the model's dtype."""

    index: torch.Tensor
    weight: torch.Tensor
    columns: int

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.index, self.weight))

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`, of the inputs that count."""
        chosen = x.index_select(-1, self.index)
        return torch.nn.functional.linear(chosen, self.weight.to(x.dtype))

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        out = self.weight.new_zeros(len(index), self.columns)
        return out.index_copy_(1, self.index, self.weight.index_select(0, index))
