"""Deltas that share a tensor: it is in memory once, each variant adds a mask, an index and a scale.

A mask is kept at one bit a weight and opened for every product, a piece of the matrix at a time: the
memory of a family is bought with time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from deltafold.compress import bits
from deltafold.compress.terms import Context, Shared
from deltafold.compress.terms.base import Parts

_Key: TypeAlias = tuple[str, str, torch.device, torch.dtype]
_lock: Final = threading.Lock()
#: Entries that are opened at a time: few enough to stay in a CPU's cache until they are multiplied.
_PIECE: Final = 2**19
#: Up to so many groups multiplying by all their rows is quicker than copying those that are taken.
_FEW_GROUPS: Final = 4


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
        groups, rows, columns = self.table.weight.shape
        if self.mask is None and groups <= _FEW_GROUPS:
            every = self.table.weight.reshape(groups * rows, columns)
            found = torch.nn.functional.linear(x, every.to(x.dtype))
            if self.index is not None:
                places = torch.arange(rows, device=found.device)
                found = found.index_select(-1, self.index * rows + places)
            return found * self.scale
        step = max(1, _PIECE // max(columns, 1))
        pieces = [
            torch.nn.functional.linear(x, self._taken(slice(start, start + step)).to(x.dtype))
            for start in range(0, rows, step)
        ]
        return torch.cat(pieces, -1) * self.scale if pieces else x.new_zeros(len(x), 0)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        return self._taken(index) * self.scale

    def _taken(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """What is taken of some rows, before the scale."""
        weight = self.table.weight
        if self.index is None:
            chosen = weight[0, rows]
        else:
            every = torch.arange(weight.shape[1], device=weight.device)
            chosen = weight[self.index[rows], every[rows]]
        if self.mask is None:
            return chosen
        # A product of floats is several times quicker than choosing by a mask of bools.
        return _opened(self.mask[rows], weight.shape[2]).to(weight.dtype).mul_(chosen)


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


def shared_bytes(families: Collection[str]) -> int:
    """Memory that the tables of some families take, in bytes; families by their digests."""
    with _lock:
        tables = [table for (family, *_), table in _tables.items() if family in families]
    return sum(t.weight.numel() * t.weight.element_size() for t in tables)


def _opened(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 `[n, M]` of 1-bit codes."""
    if mask.device.type == "cpu":
        return bits.unpack(mask, 1, columns)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    opened = (mask.unsqueeze(-1) >> places) & 1
    return opened.reshape(*mask.shape[:-1], -1)[..., :columns]
