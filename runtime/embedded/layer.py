"""One attention layer's keys and values for a batch whose rows come and go.

Rows are aligned to the right: the newest token of every row sits in the last column, and a row that
is shorter than the batch has columns on its left that the attention mask hides. Appending a token
is therefore the same write for every row, whatever the rows' lengths, and no table of pages is
needed, so any attention function that transformers offers can read the memory.

The buffer is bigger than the batch: `[rows, columns]` of it are a window that slides to the right
with every token and gives up columns on its left when the longest row leaves.

    buffer columns   0 . . . start = = = = = = = end . . . capacity
                     (stale)       the batch         (free)

Hidden columns are multiplied by an attention weight of zero, so they must hold finite numbers: a
buffer starts as zeros, and columns that a batch newly covers are cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers.cache_utils import DynamicLayer

#: Buffers have a multiple of this many columns.
COLUMN_STEP: Final = 64


class KVLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values `[rows, heads, columns, head size]`, written in place.

    Full length for every layer: where a model uses a sliding window, its mask hides what lies
    outside. `DynamicLayer` supplies what differs between transformers' releases (mask sizes).
    """

    def __init__(self, expected_columns: int = 0, **_: Any) -> None:
        """`expected_columns`: how many are about to be written; saves growing step by step."""
        super().__init__()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self._expected = expected_columns
        self._buffers: list[torch.Tensor] = []
        self._rows = self._start = self._end = 0

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self._rows

    @property
    def columns(self) -> int:
        """Columns of the batch, padding included."""
        return self._end - self._start

    @property
    def capacity(self) -> tuple[int, int]:
        """Rows and columns that the buffers have room for."""
        if not self._buffers:
            return 0, 0
        return self._buffers[0].shape[0], self._buffers[0].shape[2]

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        """Allocate buffers like the first states that are written."""
        values = key_states if value_states is None else value_states
        rows, width = key_states.shape[0], max(self._expected, key_states.shape[2])
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [_zeros(s, rows, _round_up(width + 1)) for s in (key_states, values)]
        self._rows = rows
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new columns to every row.

        Args:
            key_states: `[rows, heads, new columns, head size]`.
            value_states: the same; the head size may differ.

        Returns:
            Views of all the batch's keys and values, valid until the next change.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert key_states.shape[0] == self._rows, "the forward pass has other rows than the cache"
        new = key_states.shape[2]
        self._make_room(self._rows, before=0, after=new)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self._rows, :, self._end : self._end + new] = states
        self._end += new
        return self._publish()

    def join(self, other: KVLayer) -> None:
        """Add another batch's rows below these; both keep their right edge."""
        rows, more = self._rows, other.columns - self.columns
        self._make_room(rows + other.rows, before=max(0, more), after=0)
        first = self._end - other.columns
        for mine, theirs in zip(self._buffers, other._window(), strict=True):
            if more > 0:
                mine[:rows, :, first : self._start] = 0
            else:
                mine[rows : rows + other.rows, :, self._start : first] = 0
            mine[rows : rows + other.rows, :, first : self._end] = theirs
        self._start = min(self._start, first)
        self._rows = rows + other.rows
        self._publish()

    def keep(self, moves: Sequence[tuple[int, int]], rows: int) -> None:
        """Copy row `source` over row `target` for each move, then keep the first `rows` rows."""
        for buffer in self._buffers:
            for source, target in moves:
                buffer[target] = buffer[source]
        self._rows = rows
        self._publish()

    def trim(self, columns: int) -> None:
        """Forget this many columns on the left, which all rows must have as padding."""
        self._start += columns
        self._publish()

    def _window(self) -> list[torch.Tensor]:
        return [b[: self._rows, :, self._start : self._end] for b in self._buffers]

    def _publish(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = self._window()
        return self.keys, self.values

    def _make_room(self, rows: int, *, before: int, after: int) -> None:
        """Place the window so that `rows` rows and the extra columns on either side fit."""
        have_rows, have_columns = self.capacity
        if rows <= have_rows and self._start >= before and self._end + after <= have_columns:
            return
        width = self.columns
        need = before + width + after
        # Moving the window back inside the same size pays off only if it frees a good part of it.
        columns = _grow(have_columns, need, spare=need // 3)
        for i, states in enumerate(self._window()):
            target = _zeros(self._buffers[i], _grow(have_rows, rows), _round_up(columns))
            target[: self._rows, :, before : before + width] = states
            self._buffers[i] = target
        self._start, self._end = before, before + width


def _grow(have: int, need: int, spare: int = 0) -> int:
    """`have` while it fits without much waste, else half as much again as needed."""
    return have if need + spare <= have <= 4 * (need + spare) else need * 3 // 2


def _zeros(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A cleared buffer `[rows, heads, columns, head size]`."""
    return like.new_zeros((rows, like.shape[1], columns, like.shape[3]))


def _round_up(columns: int) -> int:
    return -(-columns // COLUMN_STEP) * COLUMN_STEP
