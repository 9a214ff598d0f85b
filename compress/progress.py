"""Progress as events, so that no library code draws a bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a long run.

    Attributes:
        phase: what is going on.
        name: the tensor that was just finished.
        done: tensors finished in this phase.
        total: tensors of this phase.
        nbytes: bytes of the tensor.
    """

    phase: Literal["hash", "pack", "restore", "export", "verify", "share"]
    name: str
    done: int
    total: int
    nbytes: int


OnProgress: TypeAlias = Callable[[Progress], None]


def ignore(event: Progress) -> None:
    """The default listener."""
