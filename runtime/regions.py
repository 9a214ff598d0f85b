"""Where a checkpoint's tensor lies inside a parameter of another name or layout, found by content.

Loaders fuse what a checkpoint stores apart (experts, gate and up projections) and rename the rest.
The base's own bytes tell where each tensor went, so no table of names is needed, and what is found
is right by construction: it was compared element for element.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

#: Parameters that are looked through for one tensor, best names first.
_MOST_CANDIDATES = 8


@dataclass(frozen=True)
class Region:
    """A part of one parameter that holds one checkpoint tensor.

    Attributes:
        slot: the parameter's name.
        index: in its first dimension, where the tensor has one dimension less.
        across: the region is made of columns, not rows.
        turned: the tensor lies transposed in it.
        start: first row (column).
        step: from one row (column) to the next.
        count: rows (columns).
    """

    slot: str
    index: int | None
    across: bool
    turned: bool
    start: int
    step: int
    count: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of this region in a tensor of the parameter's shape, as the checkpoint has it."""
        part = whole if self.index is None else whole[self.index]
        part = _turn(part) if self.across else part
        part = part[self.start : self.start + self.step * (self.count - 1) + 1 : self.step]
        return _turn(part) if self.turned else part


def find_region(
    name: str, tensor: torch.Tensor, candidates: Iterable[tuple[str, torch.Tensor]]
) -> Region | None:
    """The one region that equals a checkpoint's tensor; None where there is none, or several.

    Args:
        name: the tensor's name in the checkpoint.
        tensor: the base's value.
        candidates: parameters that no name of the checkpoint claims.
    """
    words = _words(name)
    ranked = sorted(
        ((len(words & _words(slot)), slot, value) for slot, value in candidates),
        key=lambda c: (-c[0], c[1]),
    )
    best: int | None = None
    found: list[Region] = []
    for shared, slot, value in ranked[:_MOST_CANDIDATES]:
        if best is not None and shared < best:
            break
        matches = list(_matches(slot, value.detach(), tensor.to(value.device, value.dtype)))
        if matches:
            best = shared
            found += matches
    if len(found) > 1:
        # Experts that are copies of one another: the number in the name tells them apart.
        found = [r for r in found if r.index is not None and str(r.index) in words]
    return found[0] if len(found) == 1 else None


def _matches(slot: str, value: torch.Tensor, tensor: torch.Tensor) -> Iterator[Region]:
    if value.dim() == tensor.dim():
        yield from _within(slot, None, value, tensor)
    elif value.dim() == tensor.dim() + 1:
        for index in range(value.shape[0]):
            yield from _within(slot, index, value[index], tensor)


def _within(
    slot: str, index: int | None, value: torch.Tensor, tensor: torch.Tensor
) -> Iterator[Region]:
    """Regions of rows first; a square tensor may lie in four ways, of which one is enough."""
    if value.dim() > 2:
        for turned in (False, True):
            if torch.equal(value, _turn(tensor) if turned else tensor):
                yield Region(slot, index, False, turned, 0, 1, value.shape[0])
                return
        return
    ways = (False, True) if value.dim() == 2 else (False,)
    for across in ways:
        for turned in ways:
            rows = _turn(value) if across else value
            wanted = _turn(tensor) if turned else tensor
            spots = list(_runs(rows, wanted))
            if spots:
                for start, step in spots:
                    yield Region(slot, index, across, turned, start, step, wanted.shape[0])
                return


def _runs(rows: torch.Tensor, wanted: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Every start and step at which `wanted` is a run of `rows`."""
    count = wanted.shape[0]
    if rows.shape[1:] != wanted.shape[1:] or not 0 < count <= rows.shape[0] or not wanted.numel():
        return
    for start in _equal_rows(rows, wanted[0]):
        if count == 1:
            yield start, 1
            continue
        most = (rows.shape[0] - 1 - start) // (count - 1)
        for step in range(1, min(most, 4) + 1):
            if torch.equal(rows[start : start + step * (count - 1) + 1 : step], wanted):
                yield start, step


def _equal_rows(rows: torch.Tensor, row: torch.Tensor) -> list[int]:
    if rows.dim() == 1:
        return [int(i) for i in (rows == row).nonzero().reshape(-1)]
    likely = (rows[:, 0] == row[0]).nonzero().reshape(-1)
    return [int(i) for i in likely if torch.equal(rows[i], row)]


def _turn(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-1, -2)


def _words(name: str) -> frozenset[str]:
    return frozenset(name.replace("_", ".").split("."))
