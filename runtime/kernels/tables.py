"""Packed forms of embedding tables: a row is decoded when a token asks for it.

A table in its packed form is what a variant costs in memory; decoding a few rows a step is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from deltafold.compress.terms import NM, Codebook, Codes, ColumnPlanes, Context, Planes
from deltafold.compress.terms.base import Parts

#: Terms whose rows can be decoded without the others.
TABLES: Final = (NM, Codebook, Codes, ColumnPlanes, Planes)


@dataclass(frozen=True)
class PackedTable:
    """Planes or codes in their disk layout.

    Attributes:
        term: one of `TABLES`.
        parts: the stored parts, on the CPU.
        columns: M.
        dtype: of the rows that `gather` returns.
        device: where they are returned.
    """

    term: NM | Codebook | Codes | ColumnPlanes | Planes
    parts: dict[str, torch.Tensor]
    columns: int
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(p.numel() * p.element_size() for p in self.parts.values())

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """Not for products: the disk layout has no fast one."""
        raise AssertionError("packed tables are made for gathers only")

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of D."""
        rows = index.to("cpu")
        shape = (len(rows), self.columns)
        decoded = self.term.decode(parts_of_rows(self.term, self.parts, rows), shape, Context(""))
        return decoded.to(device=self.device, dtype=self.dtype)


def parts_of_rows(term: object, parts: Parts, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of one of `TABLES` that stand for some rows, int64 `[n]`."""
    out = dict(parts)
    if isinstance(term, Planes | ColumnPlanes):
        out["signs"] = parts["signs"].index_select(1, rows)
        if isinstance(term, Planes) and term.scale != "tensor":
            out["scales"] = parts["scales"].index_select(1, rows)
        return out
    by_row = ["codes", "scales", "positions", "values"]
    if isinstance(term, Codebook) and term.scale == "row":
        by_row.append("table")
    for key in by_row:
        if key in parts:
            out[key] = parts[key].index_select(0, rows)
    return out
