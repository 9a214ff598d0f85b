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
        name: the tensor, or the step, that was just finished.
        done: tensors or steps finished in this phase.
        total: tensors or steps of this phase.
        nbytes: bytes of the tensor.
    """

    phase: Literal["hash", "plan", "pack", "restore", "export", "verify", "fit", "share"]
    name: str
    done: int
    total: int
    nbytes: int


OnProgress: TypeAlias = Callable[[Progress], None]


def ignore(event: Progress) -> None:
    """The default listener."""
