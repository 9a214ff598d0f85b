"""What a GPU slot must have room for: places of fixed size, by what can share a launch.

A captured CUDA graph replays the launches that it was captured with, on the addresses that they had. So
slots are cut at the start, for the layouts that the zoo's variants use, and a variant that comes later
must fit into them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from deltafold.runtime.kernels.triton.layout import Kind

#: Output rows of a layer that one tensor of the checkpoint fills: the first, and how many.
Span: TypeAlias = tuple[int, int]
#: What shares a launch, as in `kernels/triton/grouped.py`: a kind of slices, a sparse layout, low rank.
Key: TypeAlias = Kind | tuple[int, int] | None


@dataclass(frozen=True)
class Place:
    """Room for one variant's pieces of one key.

    Attributes:
        columns: of the layer's input.
        kind: of slices, else None.
        entries: slices; 1 for what is not slices.
        room: entries of 32 rows for sparse rows, the rank for factors, else 0.
    """

    columns: int
    kind: Kind | None = None
    entries: int = 1
    room: int = 0

    def largest(self, other: Place) -> Place:
        """Room for either of two."""
        entries, room = max(self.entries, other.entries), max(self.room, other.room)
        return replace(self, entries=entries, room=room)

    def holds(self, other: Place) -> bool:
        """Whether what needs `other` fits in here."""
        return self.largest(other) == self


@dataclass
class Needs:
    """What the variants of a zoo need at one hook.

    Attributes:
        places: by span and key.
        dense: whether some tensor has no packed form and needs a dense copy of the weight.
    """

    places: dict[Span, dict[Key, Place]] = field(default_factory=dict)
    dense: bool = False

    def add(self, span: Span, found: Iterable[tuple[Key, Place]]) -> None:
        """Add what one variant's tensor needs in its span."""
        mine = self.places.setdefault(span, {})
        for key, place in found:
            mine[key] = mine[key].largest(place) if key in mine else place

    def lacking(self, other: Needs) -> bool:
        """Whether something of `other` has no room here."""
        if other.dense and not self.dense:
            return True
        for span, wanted in other.places.items():
            mine = self.places.get(span, {})
            if any(key not in mine or not mine[key].holds(p) for key, p in wanted.items()):
                return True
        return False
