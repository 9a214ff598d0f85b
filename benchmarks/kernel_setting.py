"""What the cases of `kernels.py` have in common: one layer, its batch, and a way to compute it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from timing import CALLS, Call

from deltafold.runtime.kernels.base import DeltaMatrix

#: Bytes of weights that no cache holds; smaller layers get several copies.
_UNCACHED = 2**28
#: Bytes of deltas that are kept of one kind; beyond it variants share memory, far apart from each
#: other.
MOST_HELD = 2**31
#: Variants up to which weights are swapped: each further one takes as long as those before it.
MOST_SWAPPED = 16

linear = torch.nn.functional.linear
#: Cases that are left out, and why.
Refused = dict[str, str]
#: The forms of one variant, one for each part of the layer.
Parts = tuple[DeltaMatrix, ...]


@dataclass(frozen=True)
class Setting:
    """One layer and its batch.

    Attributes:
        widths: rows of each part: layers that read the same input and write one merged output.
        columns: M.
        variants: V.
        each: tokens of each variant.
        device: where it runs.
    """

    widths: tuple[int, ...]
    columns: int
    variants: int
    each: int
    device: torch.device

    @property
    def rows(self) -> int:
        """N of all parts together."""
        return sum(self.widths)

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return self.variants * self.each

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def packed(self) -> bool:
        """Whether the GPU kernels run, be it in Triton's interpreter."""
        return self.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def dense_bytes(self) -> int:
        """Of one copy of the weight."""
        return self.rows * self.columns * self.dtype.itemsize

    def copies(self, size: int) -> int:
        """How many copies of data of this size make it uncached."""
        wanted = min(CALLS, -(-_UNCACHED // max(size, 1))) if self.device.type == "cuda" else 1
        return max(1, wanted)

    @cached_property
    def x(self) -> torch.Tensor:
        """Activations `[V * each, M]`."""
        shape = (self.tokens, self.columns)
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    @cached_property
    def weights(self) -> list[torch.Tensor]:
        """Copies of the base's weight."""
        return [self.random_weight() for _ in range(self.copies(self.dense_bytes))]

    def random_weight(self) -> torch.Tensor:
        """A weight `[N, M]`."""
        shape = (self.rows, self.columns)
        return torch.randn(shape, device=self.device, dtype=self.dtype) * 0.02

    def base(self, i: int) -> torch.Tensor:
        """The base's own product with the i-th copy of the weight, `[V * each, N]`."""
        return linear(self.x, self.weights[i % len(self.weights)])

    def part(self, variant: int) -> slice:
        """A variant's tokens."""
        return slice(variant * self.each, (variant + 1) * self.each)

    def outputs(self, y: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a merged output, views of it."""
        return list(y.split(self.widths, dim=1))

    def sets(self, make: Callable[[int], DeltaMatrix]) -> list[list[Parts]]:
        """Forms of all variants, and of so many copies of them that no cache holds them.

        Args:
            make: a form of so many rows.
        """
        first = tuple(make(rows) for rows in self.widths)
        size = max(sum(form.nbytes for form in first), 1)
        distinct = min(self.variants, max(1, MOST_HELD // size))
        found = []
        for copy in range(self.copies(size * distinct)):
            own = [
                first if not copy and not v else tuple(make(rows) for rows in self.widths)
                for v in range(distinct)
            ]
            found.append([own[v % distinct] for v in range(self.variants)])
        return found


@dataclass(frozen=True)
class Case:
    """One way to compute the layer.

    Attributes:
        name: for the table.
        call: computes it with the i-th copy of the weights.
        packed_bytes: packed weights that one call reads beside the base's.
        error: the largest error against float64, relative to the largest output; None if not checked.
        moved_bytes: all that one call reads and writes, where it is no product; it is then compared
            with a copy and not with the base.
    """

    name: str
    call: Call
    packed_bytes: int = 0
    error: Callable[[], float] | None = None
    moved_bytes: int = 0
