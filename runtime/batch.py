"""Which rows of the running batch belong to which variant.

The layers' hooks read this while a forward pass runs. Rows of the base belong to no group, so no
delta code ever visits them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deltafold.compress import DeltafoldError
from deltafold.runtime.host import Row
from deltafold.runtime.kernels.devices import applies_packed

if TYPE_CHECKING:
    from deltafold.runtime.kernels.triton.segments import Segments
    from deltafold.runtime.loading import LoadedVariant


@dataclass(frozen=True)
class Group:
    """The rows of one variant.

    Attributes:
        variant: whose delta to add.
        size: batch rows of this variant; the groups' rows follow one another in `BatchState.rows`.
        slot: a number that is the variant's own while it lives.
    """

    variant: LoadedVariant
    size: int
    slot: int = 0


class SlotBook:
    """Numbers of variants that stay the same while these live, so that tables by slot seldom change."""

    def __init__(self) -> None:
        self.capacity = 8
        self._of: dict[int, tuple[weakref.ref[LoadedVariant], int]] = {}

    def of(self, variant: LoadedVariant) -> int:
        """The variant's slot; a new variant gets the lowest that no living one has."""
        known = self._of.get(id(variant))
        if known is not None and known[0]() is variant:
            return known[1]
        self._of = {key: seat for key, seat in self._of.items() if seat[0]() is not None}
        taken = {slot for _, slot in self._of.values()}
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        while slot >= self.capacity:
            self.capacity *= 2
        self._of[id(variant)] = (weakref.ref(variant), slot)
        return slot


class BatchState:
    """The current batch, shared by all hooks of one model; used by one thread.

    Attributes:
        groups: variants with rows in this batch.
        rows: int64, the batch rows of all groups, one group after the other, on the model's device.
        scales: float32, the factor of each of these rows' deltas; None where all are 1.
        size: rows of the whole batch.
        packed: whether kernels apply the variants' deltas together, by slot.
        epoch: a number that no two fillings of the batch have in common.
        reports: names of modules that added a delta, while a warm-up pass collects them; else None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.groups: tuple[Group, ...] = ()
        self.rows = torch.empty(0, dtype=torch.int64, device=device)
        self.scales: torch.Tensor | None = None
        self.size = 0
        self.packed = applies_packed(device)
        self.epoch = self._epochs = 0
        self.reports: set[str] | None = None
        self._slots = SlotBook()
        self._slot_of_row = torch.empty(0, dtype=torch.int64, device=device)
        self._segments: dict[tuple[int, int], Segments] = {}

    @contextmanager
    def running(self, rows: Sequence[tuple[LoadedVariant | None, float]]) -> Iterator[None]:
        """Within it, batch row i runs `rows[i]`."""
        assert not self.groups, "batches do not nest"
        self._fill(rows)
        try:
            yield
        finally:
            self._clear()

    @contextmanager
    def narrowed(self, variant: LoadedVariant, scale: float, size: int) -> Iterator[None]:
        """Within it, the batch is `size` requests of one variant: a module runs again for them."""
        kept = (self.groups, self.rows, self.scales, self.size)
        kept_segments = (self._slot_of_row, self._segments, self.epoch)
        self._fill([(variant, scale)] * size)
        try:
            yield
        finally:
            self.groups, self.rows, self.scales, self.size = kept
            self._slot_of_row, self._segments, self.epoch = kept_segments

    def report(self, name: str) -> None:
        """A module says that it has added its variants' deltas."""
        if self.reports is not None:
            self.reports.add(name)

    def rows_in(self, leading: int, where: str) -> tuple[torch.Tensor, int]:
        """The groups' rows in a tensor whose first dimension is `leading`, and how many a batch row.

        Most modules see `[B, T, ...]`; some see all tokens in one dimension `[B * T, ...]`.

        Raises:
            DeltafoldError: `engine-unsupported` where that dimension cannot be the batch.
        """
        if leading == self.size:
            return self.rows, 1
        each, rest = divmod(leading, self.size)
        if rest or not each:
            raise DeltafoldError(
                "engine-unsupported",
                f"{where} does not keep requests apart: its input has {leading} rows for a batch of "
                f"{self.size}.",
                fix="restore this variant and serve it by itself",
            )
        within = torch.arange(each, device=self._device)
        return (self.rows.unsqueeze(1) * each + within).reshape(-1), each

    @property
    def capacity(self) -> int:
        """Slots there are; all groups' are below it."""
        return self._slots.capacity

    def segments(self, tokens: int, block: int = 0) -> Segments:
        """The batch's tokens by slot, `tokens` of each row; made once a forward pass.

        Args:
            tokens: of each row.
            block: most tokens of a tile; 0 for what suits the longest variant.
        """
        from deltafold.runtime.kernels.triton.segments import block_for, make_segments

        block = block or block_for(max(group.size for group in self.groups) * tokens)
        found = self._segments.get((tokens, block))
        if found is None:
            slots = self._slot_of_row.repeat_interleave(tokens)
            scales = None
            if self.scales is not None:
                by_row = torch.ones(self.size, device=self._device)
                by_row[self.rows] = self.scales
                scales = by_row.repeat_interleave(tokens)
            tiles = sum(-(-group.size * tokens // block) for group in self.groups)
            found = make_segments(slots, self.capacity, block, scales, tiles)
            self._segments[tokens, block] = found
        return found

    def for_each_row(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor that is one for all requests, repeated for each; others as they are."""
        if value.shape[0] == 1 != self.size:
            return value.expand(self.size, *value.shape[1:]).clone()
        return value

    def spread_scales(self, each: int, like: torch.Tensor) -> torch.Tensor:
        """The scales for rows from `rows_in`, shaped to multiply `like`."""
        assert self.scales is not None
        repeated = self.scales.repeat_interleave(each) if each > 1 else self.scales
        return repeated.reshape(-1, *[1] * (like.dim() - 1)).to(like.dtype)

    def _clear(self) -> None:
        self.groups = ()
        self.rows = torch.empty(0, dtype=torch.int64, device=self._device)
        self.scales = None
        self.size = 0
        self._segments = {}

    def _fill(self, rows: Sequence[tuple[LoadedVariant | None, float]]) -> None:
        members: dict[int, list[int]] = {}
        for i, (variant, scale) in enumerate(rows):
            # Scale 0 is the base itself.
            if variant is not None and scale != 0:
                members.setdefault(id(variant), []).append(i)
        order = [i for indices in members.values() for i in indices]
        groups = []
        for indices in members.values():
            variant = rows[indices[0]][0]
            assert variant is not None
            slot = self._slots.of(variant) if self.packed else 0
            groups.append(Group(variant, len(indices), slot))
        self._epochs += 1
        self.epoch = self._epochs
        self.size = len(rows)
        self.rows = torch.tensor(order, dtype=torch.int64, device=self._device)
        self.scales = None
        if any(rows[i][1] != 1 for i in order):
            factors = [rows[i][1] for i in order]
            self.scales = torch.tensor(factors, dtype=torch.float32, device=self._device)
        self.groups = tuple(groups)
        self._segments = {}
        if self.packed:
            of_row = [-1] * len(rows)
            for group, indices in zip(groups, members.values(), strict=True):
                for i in indices:
                    of_row[i] = group.slot
            self._slot_of_row = torch.tensor(of_row, dtype=torch.int64, device=self._device)


def loaded_rows(rows: Sequence[Row]) -> list[tuple[LoadedVariant | None, float]]:
    """Rows as the engine names them, as the loaded variants that they stand for."""
    from deltafold.runtime.loading import Handle, LoadedVariant

    out: list[tuple[LoadedVariant | None, float]] = []
    for variant, scale in rows:
        assert variant is None or isinstance(variant, Handle)
        loaded = None if variant is None else variant.loaded
        assert loaded is None or isinstance(loaded, LoadedVariant), "it has a model of its own"
        out.append((loaded, scale))
    return out
