"""The contract of an edit: a delta in, a delta out, before any codec sees it.

An edit is a frozen dataclass whose fields are its options. One that must look at the whole model
first (a threshold over all tensors) has a `survey`, which returns the edit with what it found. One
that changes each row without looking at others may say so with `blockwise = True` (see `Method`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Final, Protocol, Self, runtime_checkable

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.spec import build_from_spec
from deltafold.compress.terms import Context


@runtime_checkable
class Edit(Protocol):
    """A change of one tensor's delta."""

    id: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """The edited delta, float32 of the same shape; `delta` is left alone."""
        ...


@runtime_checkable
class SurveyedEdit(Edit, Protocol):
    """An edit that looks at every tensor before it changes the first."""

    def survey(self, deltas: Iterable[tuple[str, torch.Tensor]]) -> Self:
        """The edit with what it needs to know of the whole model filled in.

        `deltas` can be gone through several times; each time the model is read anew.
        """
        ...


EDITS: Final[dict[str, type[Any]]] = {}


def edit(cls: type[Any]) -> type[Any]:
    """Class decorator: make an edit known under its id; a duplicate is an error."""
    assert cls.id not in EDITS, f"two edits share the id {cls.id!r}"
    EDITS[cls.id] = cls
    return cls


def parse_edit(spec: str) -> Edit:
    """`name:key=value,...` as an edit. Raises `unknown-codec` or `bad-recipe`."""
    built: Edit = build_from_spec(spec, EDITS, kind="edit", group="deltafold.edits", flag="--edit")
    return built
