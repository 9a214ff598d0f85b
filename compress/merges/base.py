"""The contract of a merge: several deltas of one base in, one delta out, tensor by tensor.

A merge is a frozen dataclass whose fields are its options. One that must look at the whole models
first has a `survey`, which returns the merge with what it found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.spec import build_from_spec
from deltafold.compress.terms import Context


class Merging(Protocol):
    """Something that can make one delta of several."""

    def merge(
        self, deltas: Sequence[torch.Tensor], weights: Sequence[float], context: Context
    ) -> torch.Tensor:
        """One float32 delta from several of one shape; a model that lacks a change brings zeros."""
        ...


@runtime_checkable
class Merge(Merging, Protocol):
    """A way to make one delta of several."""

    id: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]


@runtime_checkable
class SurveyedMerge(Protocol):
    """A merge that looks at every tensor of every model before it merges the first."""

    id: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]

    def survey(
        self, deltas: Iterable[tuple[str, Sequence[torch.Tensor]]], weights: Sequence[float]
    ) -> Merging:
        """The merge with what it needs to know of the whole models.

        `deltas` can be gone through several times.
        """
        ...


MERGES: Final[dict[str, type[Any]]] = {}


def merge(cls: type[Any]) -> type[Any]:
    """Class decorator: make a merge known under its id; a duplicate is an error."""
    assert cls.id not in MERGES, f"two merges share the id {cls.id!r}"
    MERGES[cls.id] = cls
    return cls


def parse_merge(spec: str) -> Merge | SurveyedMerge:
    """`name:key=value,...` as a merge. Raises `unknown-codec` or `bad-recipe`."""
    built: Merge | SurveyedMerge = build_from_spec(
        spec, MERGES, kind="merge", group="deltafold.merges", flag="--method"
    )
    return built


def weighted_sum(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """`sum_t weight_t D_t`, float32."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def check_number(who: str, name: str, value: float) -> None:
    """Raises `bad-recipe` unless a coefficient is finite."""
    if not float("-inf") < value < float("inf"):
        raise DeltafoldError("bad-recipe", f"{who}: {name} must be a number, not {value}")
