"""What coding a tensor comes to, and where its parts go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from deltafold.compress.journal import Place
from deltafold.compress.terms import Term

#: Keeps a part and says where.
Sink: TypeAlias = Callable[[torch.Tensor], Place]


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What is worth knowing of one tensor's delta.

    Attributes:
        mean_abs: mean of |D|.
        max_abs: largest |D|.
        relative: ||D||_F / ||W_base||_F.
        error: ||D - decoded||_F / ||D||_F.
        changed: share of entries that differ.
    """

    mean_abs: float
    max_abs: float
    relative: float
    error: float
    changed: float


class Coded(NamedTuple):
    """A finished tensor: its terms, the places of their parts, and what is known of it.

    `terms` is empty where the tensor is equal to the base's.
    """

    base: str | None
    variant: str
    terms: list[Term]
    places: list[dict[str, Place]]
    stats: TensorStats | None
