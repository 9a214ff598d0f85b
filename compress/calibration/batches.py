"""Rows of token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

#: The label of a token that nobody asks the model to predict.
IGNORED: Final = -100


@dataclass(frozen=True, slots=True)
class Row:
    """One example.

    Attributes:
        ids: int64 `[T]`.
        labels: int64 `[T]`: the token itself where the model is to predict it from those before, and
            `IGNORED` elsewhere. The first is always `IGNORED`.
    """

    ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def predicted(self) -> int:
        """Tokens that the model is to predict."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right, where no token of a causal model sees the padding.

    Attributes:
        ids: int64 `[B, T]`.
        mask: int64 `[B, T]`, 0 at padding.
        labels: int64 `[B, T]`, `IGNORED` at padding.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.labels.to(device))


def make_row(ids: Sequence[int], prompt: int = 1) -> Row:
    """A row whose first `prompt` tokens (one at least) need not be predicted."""
    tokens = torch.tensor(list(ids), dtype=torch.int64)
    labels = tokens.clone()
    labels[: max(prompt, 1)] = IGNORED
    return Row(tokens, labels)


def padded(rows: Sequence[Row]) -> Batch:
    """Rows as one batch."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row.ids
        mask[number, : len(row)] = 1
        labels[number, : len(row)] = row.labels
    return Batch(ids, mask, labels)


def in_batches(rows: Sequence[Row], size: int) -> Iterator[Batch]:
    """Batches of up to `size` rows, in order."""
    for start in range(0, len(rows), size):
        yield padded(rows[start : start + size])


def of_one_length(rows: Sequence[Row], size: int) -> Iterator[Batch]:
    """Batches of rows of equal length, without any padding: what a layer sees are real tokens."""
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for length in sorted(by_length):
        yield from in_batches(by_length[length], size)
