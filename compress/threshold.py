"""The k-th largest magnitude of a whole model, in two readings and a megabyte.

Magnitudes are float32, whose bits, read as an integer, have the order of the values. The first reading
counts the upper halves of these integers, which tells in which of 32,768 bins the wanted one lies; the
second counts the lower halves within that bin. The result is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

_LOW = 16
_BINS = 1 << _LOW

#: Reads every tensor of a model once more.
Reading = Callable[[], Iterable[torch.Tensor]]


def magnitude_threshold(read: Reading, keep: float) -> float:
    """The magnitude that a share `keep` of all entries reaches.

    Args:
        read: gives the same float32 tensors of any shapes whenever it is called.
        keep: share of the entries, in (0, 1]; at least one entry is kept.

    Returns:
        The `round(keep * n)`-th largest |D| of all n entries; 0 where there are none.
    """
    upper = torch.zeros(_BINS, dtype=torch.int64)
    for tensor in read():
        upper += torch.bincount(_bits(tensor) >> _LOW, minlength=_BINS)
    total = int(upper.sum())
    if not total:
        return 0.0
    wanted = max(round(keep * total), 1)
    bin_, before = _find(upper, wanted)
    lower = torch.zeros(_BINS, dtype=torch.int64)
    for tensor in read():
        bits = _bits(tensor)
        lower += torch.bincount(bits[bits >> _LOW == bin_] & (_BINS - 1), minlength=_BINS)
    low, _ = _find(lower, wanted - before)
    return torch.tensor((bin_ << _LOW) | low, dtype=torch.int32).view(torch.float32).item()


def tensor_threshold(delta: torch.Tensor, keep: float) -> float:
    """The same of one tensor."""
    return magnitude_threshold(lambda: [delta], keep)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().contiguous().view(torch.int32).reshape(-1)


def _find(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin of the wanted-th entry from above, and how many lie in the bins above it."""
    above = counts.flip(0).cumsum(0)
    place = int((above >= wanted).to(torch.int8).argmax())
    return len(counts) - 1 - place, int(above[place - 1]) if place else 0
