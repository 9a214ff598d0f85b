"""The contract of a merge: several deltas of one base in, one delta out, tensor by tensor.

A merge is a frozen dataclass whose fields are its options. One that must look at the whole models
first has a `survey`, which returns the merge with what it found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final, Protocol, Self, runtime_checkable

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.spec import build_from_spec
from deltafold.compress.terms import Context


@runtime_checkable
class Merge(Protocol):
    """A way to make one delta of several."""

    id: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]

    def merge(
        self, deltas: Sequence[torch.Tensor], weights: Sequence[float], context: Context
    ) -> torch.Tensor:
        """One float32 delta from several of one shape; a model that lacks a change brings zeros."""
        ...


@runtime_checkable
class SurveyedMerge(Merge, Protocol):
    """A merge that looks at every tensor of every model before it merges the first."""

    def survey(self, deltas: Iterable[tuple[str, Sequence[torch.Tensor]]]) -> Self:
        """The merge with what it needs to know of the whole models filled in."""
        ...


MERGES: Final[dict[str, type[Any]]] = {}


def merge(cls: type[Any]) -> type[Any]:
    """Class decorator: make a merge known under its id; a duplicate is an error."""
    assert cls.id not in MERGES, f"two merges share the id {cls.id!r}"
    MERGES[cls.id] = cls
    return cls


def parse_merge(spec: str) -> Merge:
    """`name:key=value,...` as a merge. Raises `unknown-codec` or `bad-recipe`."""
    built: Merge = build_from_spec(
        spec, MERGES, kind="merge", group="deltafold.merges", flag="--method"
    )
    return built
