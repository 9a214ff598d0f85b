"""Where the slices of each slot lie: tables of addresses that kernels read on the device.

Variants come and go, so their weights are not stacked. A table has a row for each part of a launch and
each slot of the batch and, in it, an entry for each slice: a residual plane, a part of a code, a
component of a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch

from deltafold.runtime.kernels.triton.layout import Kind, Slice
from deltafold.runtime.kernels.triton.parts import first_blocks

_Piece = TypeVar("_Piece")
#: What each slot of each part applies, with weights: `[part][slot]` is a list of pieces.
ByPart: TypeAlias = Sequence[Sequence[Sequence[tuple[_Piece, float]]]]


@dataclass(frozen=True, eq=False)
class SliceTable:
    """Slices of one kind by part and slot; the addresses stay valid only while the slices live.

    Attributes:
        kind: of all slices, as `Kind.of_blocks` gives it: their rows may differ.
        widths: rows of the widest slice of each part.
        counts: int32 `[parts, slots]`, slices of each.
        rows: int32 `[parts, slots]`, rows of each slot's slices; slots of one part may differ.
        places: int32 `[2, parts + 1]`: first block of rows of each part, and its width.
        words: int64 `[parts, slots, entries]`, addresses.
        levels: int64 `[parts, slots, entries]`, addresses.
        columns: int64 `[parts, slots, entries]`, addresses, or 0.
        factors: float32 `[parts, slots, entries]`.
    """

    kind: Kind
    widths: tuple[int, ...]
    counts: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    words: torch.Tensor
    levels: torch.Tensor
    columns: torch.Tensor
    factors: torch.Tensor

    @property
    def parts(self) -> int:
        """Parts, one output each."""
        return self.words.shape[0]

    @property
    def slots(self) -> int:
        """Slots."""
        return self.words.shape[1]

    @property
    def entries(self) -> int:
        """Entries of a slot, used or not."""
        return self.words.shape[2]

    @property
    def blocks(self) -> int:
        """Blocks of rows of all parts."""
        return first_blocks(self.widths, self.kind.block_rows)[-1]


def make_table(kind: Kind, by_part: ByPart[Slice], device: torch.device) -> SliceTable:
    """A table of each part's and slot's slices of one kind of blocks, each with a weight of its own.

    One copy to the device; it does not wait for it.
    """
    packed = Packed.of(by_part)
    rows = torch.zeros(packed.shape[:2], dtype=torch.int64)
    for part, slot, i, piece, weight in packed.each(by_part):
        assert piece.kind.of_blocks == kind, (piece.kind, kind)
        columns = 0 if piece.columns is None else piece.columns.data_ptr()
        addresses = (piece.words.data_ptr(), piece.levels.data_ptr(), columns)
        packed.put(part, slot, i, addresses, piece.factor * weight)
        assert rows[part, slot] in (0, piece.kind.rows), "a slot's slices have the same rows"
        rows[part, slot] = piece.kind.rows
    widths = tuple(rows.amax(1).tolist())
    first = first_blocks(widths, kind.block_rows)
    places = torch.tensor([first, [*widths, 0]], dtype=torch.int64)
    counts, addresses_, factors, more = packed.sent(device, [rows, places])
    return SliceTable(
        kind, widths, counts, more[0], more[1], addresses_[0], addresses_[1], addresses_[2], factors
    )


@dataclass(frozen=True, eq=False)
class Packed(Generic[_Piece]):
    """A table's numbers while it is filled on the host.

    Attributes:
        shape: parts, slots, entries.
        counts: int64 `[parts, slots]`.
        addresses: int64 `[columns, parts, slots, entries]`.
        factors: float64 `[parts, slots, entries]`.
    """

    shape: tuple[int, int, int]
    counts: torch.Tensor
    addresses: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def of(cls, by_part: ByPart[_Piece], columns: int = 3) -> Packed[_Piece]:
        """An empty table for these pieces, with so many addresses each."""
        slots = len(by_part[0])
        assert all(len(part) == slots for part in by_part), "all parts have all slots"
        entries = max([len(p) for part in by_part for p in part], default=0) or 1
        shape = (len(by_part), slots, entries)
        counts = torch.tensor([[len(p) for p in part] for part in by_part], dtype=torch.int64)
        addresses = torch.zeros(columns, *shape, dtype=torch.int64)
        return cls(
            shape, counts.reshape(shape[:2]), addresses, torch.zeros(shape, dtype=torch.float64)
        )

    @staticmethod
    def each(by_part: ByPart[_Piece]) -> list[tuple[int, int, int, _Piece, float]]:
        """Part, slot, entry, piece and weight of all pieces."""
        return [
            (part, slot, i, piece, weight)
            for part, slots in enumerate(by_part)
            for slot, pieces in enumerate(slots)
            for i, (piece, weight) in enumerate(pieces)
        ]

    def put(
        self, part: int, slot: int, entry: int, addresses: Sequence[int], factor: float
    ) -> None:
        """Fill one entry."""
        for column, address in enumerate(addresses):
            self.addresses[column, part, slot, entry] = address
        self.factors[part, slot, entry] = factor

    def sent(
        self, device: torch.device, more: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Counts int32, addresses int64, factors float32 and more numbers as int32, on the device.

        All in one copy, from pinned memory, which nothing waits for.
        """
        numbers = [self.counts, self.addresses, self.factors.view(torch.int64), *more]
        flat = torch.cat([part.reshape(-1) for part in numbers])
        if device.type == "cuda":
            flat = flat.pin_memory()
        there = flat.to(device, non_blocking=True)
        parts, start = [], 0
        for like in numbers:
            parts.append(there[start : start + like.numel()].view(like.shape))
            start += like.numel()
        counts, addresses, factors, *rest = parts
        return (
            counts.to(torch.int32),
            addresses,
            factors.view(torch.float64).to(torch.float32),
            [part.to(torch.int32) for part in rest],
        )
