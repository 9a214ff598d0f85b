"""The run-time form of one tensor's delta.

A stored delta is a sum of terms; at load each term becomes the form that this machine applies
fastest. All forms answer to one contract, which `reference` states in plain torch and which every
other form is tested against:

* `matmul(x)`: float or half `[k, M]` -> `[k, N]` in x's dtype, equal to `x @ D^T` with D the decoded
  delta, accumulated in float32, within the rounding of x's dtype.
* `gather(index)`: int64 `[n]` -> `[n, M]`, rows of D.

Shape letters: N rows (output features), M columns (input features), k tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class DeltaMatrix(Protocol):
    """One delta `[N, M]`, ready to be applied."""

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        ...

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T` in x's dtype."""
        ...

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D, in the form's own dtype."""
        ...


@dataclass(frozen=True)
class Sum:
    """Several forms that add up."""

    terms: Sequence[DeltaMatrix]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(term.nbytes for term in self.terms)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`."""
        total = self.terms[0].matmul(x)
        for term in self.terms[1:]:
            total = total + term.matmul(x)
        return total

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        total = self.terms[0].gather(index)
        for term in self.terms[1:]:
            total = total + term.gather(index)
        return total


@dataclass(frozen=True)
class Stacked:
    """Forms of blocks of rows, one below the other.

    Attributes:
        blocks: the forms, from the top.
        rows: rows of every block but the last.
    """

    blocks: Sequence[DeltaMatrix]
    rows: int

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(block.nbytes for block in self.blocks)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`."""
        return torch.cat([block.matmul(x) for block in self.blocks], dim=1)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        places = index // self.rows
        found: torch.Tensor | None = None
        for number in sorted(set(places.tolist())):
            mine = (places == number).nonzero().reshape(-1)
            rows = self.blocks[number].gather(index[mine] - number * self.rows)
            if found is None:
                found = rows.new_empty(len(index), rows.shape[1])
            found[mine] = rows
        return self.blocks[0].gather(index) if found is None else found


@dataclass(frozen=True)
class Scaled:
    """A form times a number: one component of a mixture."""

    inner: DeltaMatrix
    weight: float

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.inner.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`."""
        return self.inner.matmul(x) * self.weight

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        return self.inner.gather(index) * self.weight


def leaves(form: DeltaMatrix, weight: float = 1.0) -> list[tuple[DeltaMatrix, float]]:
    """A form taken apart: what its sums and weights hold, with the weight of each."""
    if isinstance(form, Scaled):
        return leaves(form.inner, weight * form.weight)
    if isinstance(form, Sum):
        return [leaf for term in form.terms for leaf in leaves(term, weight)]
    return [(form, weight)]
