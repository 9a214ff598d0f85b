"""Deltas that share a tensor: it is in memory once, each variant adds a mask, an index and a scale.

A mask is kept at one bit a weight and opened for every product, which costs several passes over the
matrix: the memory of a family is bought with time.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from deltafold.compress.terms import Context, Shared
from deltafold.compress.terms.base import Parts

_Key: TypeAlias = tuple[str, str, torch.device, torch.dtype]
_lock: Final = threading.Lock()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Table:
    """A shared tensor, `[groups, N, M]` in the model's dtype; lives as long as a variant uses it."""

    weight: torch.Tensor


_tables: Final[weakref.WeakValueDictionary[_Key, Table]] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class SharedRows:
    """`D[n] = scale * mask[n] * table[index[n], n]`.

    Attributes:
        table: in common with other variants.
        index: int64 `[N]`; None where there is one group.
        mask: uint8 `[N, ceil(M / 8)]`, low bits first; None where all entries are taken.
        scale: float32.
    """

    table: Table
    index: torch.Tensor | None
    mask: torch.Tensor | None
    scale: float

    @property
    def nbytes(self) -> int:
        """Memory held by this variant alone, in bytes."""
        own = [t for t in (self.index, self.mask) if t is not None]
        return sum(t.numel() * t.element_size() for t in own)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`."""
        weight = self.table.weight
        every = torch.arange(weight.shape[1], device=weight.device)
        chosen = weight[0] if self.index is None else weight[self.index, every]
        if self.mask is not None:
            chosen = chosen.masked_fill(~_opened(self.mask, weight.shape[2]), 0)
        return torch.nn.functional.linear(x, chosen.to(x.dtype)) * self.scale

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        weight = self.table.weight
        rows = weight[0, index] if self.index is None else weight[self.index[index], index]
        if self.mask is not None:
            rows = rows.masked_fill(~_opened(self.mask[index], weight.shape[2]), 0)
        return rows * self.scale


def shared_rows(
    term: Shared,
    parts: Parts,
    matrix: tuple[int, int],
    context: Context,
    device: torch.device,
    dtype: torch.dtype,
) -> SharedRows:
    """The form of a `shared` term; its table is read only if no variant in memory has it."""
    key = (term.family, term.key, device, dtype)
    with _lock:
        table = _tables.get(key)
        if table is None:
            decoded = term.table(*matrix, context)
            table = _tables[key] = Table(decoded.to(device, dtype))
    index = term.index(parts, matrix[0], context.name).to(device) if term.groups > 1 else None
    mask = parts["mask"].to(device) if term.masked else None
    return SharedRows(table, index, mask, term.scale)


def shared_bytes() -> int:
    """Memory that all shared tables take, in bytes."""
    with _lock:
        tables = list(_tables.values())
    return sum(t.weight.numel() * t.weight.element_size() for t in tables)


def _opened(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """bool `[n, M]` of 1-bit codes."""
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    opened = (mask.unsqueeze(-1) & places) != 0
    return opened.reshape(*mask.shape[:-1], -1)[..., :columns]
