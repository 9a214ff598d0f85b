"""Where the slices of each slot lie: tables of addresses that kernels read on the device.

Variants come and go, so their weights are not stacked. A table has a row for each slot of the batch
and, in it, an entry for each slice: a residual plane, a part of a code, a component of a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltafold.runtime.kernels.triton.layout import Kind, Slice


@dataclass(frozen=True, eq=False)
class SliceTable:
    """Slices of one kind by slot; the addresses stay valid only while the slices live.

    Attributes:
        kind: of all slices.
        counts: int32 `[slots]`, slices of each.
        words: int64 `[slots, entries]`, addresses.
        levels: int64 `[slots, entries]`, addresses.
        columns: int64 `[slots, entries]`, addresses, or 0.
        factors: float32 `[slots, entries]`.
    """

    kind: Kind
    counts: torch.Tensor
    words: torch.Tensor
    levels: torch.Tensor
    columns: torch.Tensor
    factors: torch.Tensor

    @property
    def slots(self) -> int:
        """Slots."""
        return self.counts.shape[0]

    @property
    def entries(self) -> int:
        """Entries of a slot, used or not."""
        return self.words.shape[1]


def make_table(
    kind: Kind, by_slot: Sequence[Sequence[tuple[Slice, float]]], device: torch.device
) -> SliceTable:
    """A table of each slot's slices of one kind, each with a weight of its own.

    One copy to the device; it does not wait for it.
    """
    entries = max([len(slices) for slices in by_slot], default=0) or 1
    shape = (len(by_slot), entries)
    numbers = torch.zeros(5, *shape, dtype=torch.int64)
    factors = torch.zeros(shape, dtype=torch.float64)
    for slot, slices in enumerate(by_slot):
        numbers[0, slot, 0] = len(slices)
        for i, (piece, weight) in enumerate(slices):
            assert piece.kind == kind, (piece.kind, kind)
            numbers[1, slot, i] = piece.words.data_ptr()
            numbers[2, slot, i] = piece.levels.data_ptr()
            numbers[3, slot, i] = 0 if piece.columns is None else piece.columns.data_ptr()
            factors[slot, i] = piece.factor * weight
    numbers[4] = factors.view(torch.int64)
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    there = numbers.to(device, non_blocking=True)
    return SliceTable(
        kind=kind,
        counts=there[0, :, 0].to(torch.int32),
        words=there[1],
        levels=there[2],
        columns=there[3],
        factors=there[4].view(torch.float64).to(torch.float32),
    )
