"""Which rows of a step belong to which slot: the step's mapping, as segments and as a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch


@dataclass(frozen=True)
class Segment:
    """Rows of one slot.

    Attributes:
        slot: number of the slot.
        start: first row, where they follow each other.
        stop: one past the last.
        index: int64 rows otherwise, else None.
    """

    slot: int
    start: int
    stop: int
    index: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """How many they are."""
        return self.stop - self.start if self.index is None else len(self.index)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Their rows of `x`; a view where they follow each other."""
        assert self.stop <= len(x), "a layer got fewer rows than the step has tokens"
        return x[self.start : self.stop] if self.index is None else x.index_select(0, self.index)

    def add(self, y: torch.Tensor, part: torch.Tensor) -> None:
        """Add `part` to their rows of `y`."""
        if self.index is None:
            y[self.start : self.stop].add_(part)
        else:
            y.index_add_(0, self.index, part)

    def put(self, y: torch.Tensor, part: torch.Tensor) -> None:
        """Replace their rows of `y`."""
        if self.index is None:
            y[self.start : self.stop].copy_(part)
        else:
            y.index_copy_(0, self.index, part)


def segments_of(slots: np.ndarray) -> list[Segment]:
    """int `[rows]`, -1 for the base, as segments in slot order."""
    found = []
    for slot in np.unique(slots[slots >= 0]):
        rows = np.nonzero(slots == slot)[0]
        start, stop = int(rows[0]), int(rows[-1]) + 1
        index = None if stop - start == len(rows) else torch.from_numpy(rows)
        found.append(Segment(int(slot), start, stop, index))
    return found


_NOBODY: Final = np.empty(0, np.int64)


@dataclass
class StepRows:
    """The rows of the running step.

    Attributes:
        token_slots: int64 `[most tokens]` on the model's device at an address that never changes
            (captured graphs read it); -1 for the base and for padding.
        logit_slots: the same for rows of logits.
        tokens: of the forward pass, as segments.
        logits: of the head's pass, as segments.
        step: counts the steps.
    """

    token_slots: torch.Tensor
    logit_slots: torch.Tensor
    tokens: list[Segment] = field(default_factory=list)
    logits: list[Segment] = field(default_factory=list)
    step: int = 0
    _host: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _around: torch.Tensor | None = None
    _clear: bool = False

    @classmethod
    def make(cls, tokens: int, logits: int, device: torch.device) -> StepRows:
        """For steps of up to so many tokens and rows of logits."""
        return cls(
            torch.full((tokens,), -1, dtype=torch.int64, device=device),
            torch.full((logits,), -1, dtype=torch.int64, device=device),
        )

    def set(self, tokens: Sequence[int], logits: Sequence[int]) -> None:
        """Begin a step: a slot for each token and each row of logits, -1 for the base."""
        self.step += 1
        self._host = np.asarray(tokens, np.int64)
        _fill(self.token_slots, self._host)
        rows = np.asarray(logits, np.int64)
        _fill(self.logit_slots, rows)
        self.tokens, self.logits = segments_of(self._host), segments_of(rows)
        self._clear = False

    def rest(self) -> None:
        """Begin a step of the base alone."""
        self.step += 1
        self.tokens, self.logits, self._host = [], [], _NOBODY
        if not self._clear:  # the next such step finds them as they are
            self.token_slots.fill_(-1)
            self.logit_slots.fill_(-1)
            self._clear = True

    @contextmanager
    def reading_logits(self, indices: torch.Tensor) -> Iterator[None]:
        """Within it, row i of the head's input is token `indices[i]`."""
        kept = self.logits
        n = len(indices)
        slots = self.token_slots[indices.long()]
        self.logit_slots[:n].copy_(slots)
        self.logit_slots[n:].fill_(-1)
        self._clear = False
        if self.token_slots.device.type == "cpu":
            self.logits = segments_of(slots.numpy())
        try:
            yield
        finally:
            self.logits = kept

    @contextmanager
    def around(self, hidden_states: torch.Tensor) -> Iterator[None]:
        """Within it, the head gets slices of `hidden_states`, whose rows are the step's tokens."""
        self._around = hidden_states
        try:
            yield
        finally:
            self._around = None

    def head_segments(self, x: torch.Tensor) -> list[Segment]:
        """The segments of the head's input."""
        start = self._slice_start(x)
        if start is None:
            return self.logits
        return segments_of(self._host[start : start + x.shape[0]])

    def head_slots(self, x: torch.Tensor) -> torch.Tensor:
        """int64 `[rows]` of the head's input."""
        start = self._slice_start(x)
        if start is None:
            return self.logit_slots[: x.shape[0]]
        return self.token_slots[start : start + x.shape[0]]

    @property
    def rests(self) -> bool:
        """Whether no token of the step runs a variant. Then there is nothing to launch, nor to capture:
        vLLM keeps graphs of their own for steps without variants.
        """
        return not self.tokens

    @property
    def rests_at_head(self) -> bool:
        """The same for rows of the head."""
        return not self.tokens and not self.logits

    @property
    def longest(self) -> int:
        """Tokens of the variant that has most of them, as the host knows it."""
        return max((segment.rows for segment in self.tokens), default=0)

    def _slice_start(self, x: torch.Tensor) -> int | None:
        whole = self._around
        if whole is None:
            return None
        assert x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        apart = x.storage_offset() - whole.storage_offset()
        return apart // whole.stride(0)


def _fill(buffer: torch.Tensor, values: np.ndarray) -> None:
    # A fresh host copy each step: with asynchronous scheduling the last step's may still be in flight.
    host = torch.full((len(buffer),), -1, dtype=torch.int64)
    host[: len(values)] = torch.from_numpy(values)
    if buffer.device.type == "cuda":
        host = host.pin_memory()
    buffer.copy_(host, non_blocking=True)
