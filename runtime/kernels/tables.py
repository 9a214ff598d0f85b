"""Packed forms of embedding tables: a row is decoded when a token asks for it.

A table in its packed form is what a variant costs in memory; decoding a few rows a step is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltafold.compress.terms import Codes, Context, Planes
from deltafold.compress.terms.base import Parts


@dataclass(frozen=True)
class PackedTable:
    """Planes or codes in their disk layout, rows first.

    Attributes:
        term: `Planes` or `Codes`.
        parts: the stored parts, on the CPU.
        columns: M.
        dtype: of the rows that `gather` returns.
        device: where they are returned.
    """

    term: Planes | Codes
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
        parts = _planes_rows(self.parts, rows) if isinstance(self.term, Planes) else None
        chosen = parts if parts is not None else _codes_rows(self.parts, rows)
        decoded = self.term.decode(chosen, shape, Context(""))
        return decoded.to(device=self.device, dtype=self.dtype)


def _planes_rows(parts: Parts, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    out = dict(parts)
    out["signs"] = parts["signs"].index_select(1, rows)
    if parts["scales"].dim() > 1:
        out["scales"] = parts["scales"].index_select(1, rows)
    return out


def _codes_rows(parts: Parts, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    out = dict(parts)
    out["codes"] = parts["codes"].index_select(0, rows)
    out["scales"] = parts["scales"].index_select(0, rows)
    return out
