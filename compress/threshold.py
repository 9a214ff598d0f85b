"""The k-th largest magnitude of whole models, in two readings and a megabyte.

Magnitudes are float32, whose bits, read as an integer, have the order of the values. The first reading
counts the upper halves of these integers, which tells in which of 32,768 bins the wanted one lies; the
second counts the lower halves within that bin. The result is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch

_LOW = 16
_BINS = 1 << _LOW
_PIECE = 1 << 22

#: Reads every tensor once more, of several models side by side.
Reading: TypeAlias = Callable[[], Iterable[Sequence[torch.Tensor]]]


def magnitude_thresholds(read: Reading, models: int, keep: float) -> list[float]:
    """The magnitude that a share `keep` of all entries reaches, of each model.

    Args:
        read: gives the same float32 tensors of any shapes whenever it is called.
        models: how many tensors come at a time.
        keep: share of the entries, in (0, 1]; at least one entry is kept.

    Returns:
        The `round(keep * n)`-th largest |D| of all n entries of each model; 0 where there are none.
    """
    upper = torch.zeros(models, _BINS, dtype=torch.int64)
    for tensors in read():
        for counts, tensor in zip(upper, tensors, strict=True):
            for bits in _bits(tensor):
                counts += torch.bincount(bits >> _LOW, minlength=_BINS)
    total = int(upper[0].sum())
    if not total:
        return [0.0] * models
    wanted = max(round(keep * total), 1)
    places = [_find(counts, wanted) for counts in upper]
    lower = torch.zeros(models, _BINS, dtype=torch.int64)
    for tensors in read():
        for counts, tensor, (place, _) in zip(lower, tensors, places, strict=True):
            for bits in _bits(tensor):
                within = bits[bits >> _LOW == place] & (_BINS - 1)
                counts += torch.bincount(within, minlength=_BINS)
    found = [
        (place << _LOW) | _find(counts, wanted - before)[0]
        for counts, (place, before) in zip(lower, places, strict=True)
    ]
    return torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist()


def tensor_threshold(delta: torch.Tensor, keep: float) -> float:
    """The same of one tensor."""
    return magnitude_thresholds(lambda: [(delta,)], 1, keep)[0]


def _bits(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The magnitudes' bits as int32, some megabytes at a time."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        yield flat[start : start + _PIECE].abs().view(torch.int32)


def _find(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin of the wanted-th entry from above, and how many lie in the bins above it."""
    above = counts.flip(0).cumsum(0)
    place = int((above >= wanted).to(torch.int8).argmax())
    return len(counts) - 1 - place, int(above[place - 1]) if place else 0
