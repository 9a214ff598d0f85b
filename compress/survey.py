"""Edits that must see the whole model before they change the first tensor, run before packing.

Deltas are streamed: one tensor is in memory at a time, and the model is read as often as an edit asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.edits import Edit, SurveyedEdit
from deltafold.compress.encode import context_of
from deltafold.compress.evidence import EvidenceSource
from deltafold.compress.methods import Chain, Method
from deltafold.compress.recipe import Recipe

#: The float32 delta of a tensor to the base's, rows beyond the base's included.
ReadDelta = Callable[[str], torch.Tensor]


def surveyed(
    recipe: Recipe,
    source: TensorSource,
    target: TensorSource,
    read: ReadDelta,
    *,
    evidence: EvidenceSource | None = None,
    given: Callable[[str], object | None] = lambda name: None,
) -> Recipe:
    """The recipe with every surveyed edit told of the whole model.

    An edit sees the deltas of the tensors that it will change, as the edits before it leave them.

    Args:
        recipe: how the tensors will be packed.
        source: the base.
        target: the fine-tune.
        read: gives a tensor's delta.
        evidence: of a calibration run, for edits before a surveyed one.
        given: is not None for tensors that the recipe has no say in.
    """
    if not any(isinstance(edit, SurveyedEdit) for edit in _all_edits(recipe)):
        return recipe
    names = [n for n in _edited(source, target) if given(n) is None]
    for edit in _all_edits(recipe):
        if isinstance(edit, SurveyedEdit):
            found = edit.survey(_Seen(recipe, edit, names, source, target, read, evidence))
            recipe = _with(recipe, edit, found)
    return recipe


@dataclass(frozen=True)
class _Seen:
    """What one edit sees of the model; goes through it anew each time it is iterated."""

    recipe: Recipe
    edit: Edit
    names: list[str]
    source: TensorSource
    target: TensorSource
    read: ReadDelta
    evidence: EvidenceSource | None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.names:
            spec = self.target.spec(name)
            method = self.recipe.method_for(name, spec.shape, floating=True)
            steps = _steps(method)
            place = next((i for i, step in enumerate(steps) if step is self.edit), None)
            if place is None:
                continue
            # Rows that the base lacks are stored as values.
            rows = min(spec.shape[:1] + self.source.spec(name).shape[:1], default=0)
            shared = slice(rows) if spec.shape else ...
            delta = self.read(name)[shared]
            if place:
                base, value = self.source.tensor(name)[shared], self.target.tensor(name)[shared]
                context = context_of(name, value, base, method, self.evidence)
                for step in steps[:place]:
                    delta = step.apply(delta, context)
            yield name, delta


def _edited(source: TensorSource, target: TensorSource) -> list[str]:
    """Tensors whose difference to the base is edited: floating point, and in both."""
    both = set(source.names()) & set(target.names())
    return [n for n in sorted(both) if target.spec(n).dtype in dtypes.FLOATS]


def _steps(method: Method) -> list[Edit]:
    """The edits of a method, those of a chain within a chain included, in order."""
    return [*method.edits, *_steps(method.codec)] if isinstance(method, Chain) else []


def _all_edits(recipe: Recipe) -> list[Edit]:
    """Every edit object of a recipe once, in an order in which each follows those before it."""
    methods = [recipe.default, recipe.vectors, *(m for _, m in recipe.overrides)]
    found = [e for _, e in recipe.edits] + [e for m in methods for e in _steps(m)]
    return list({id(e): e for e in found}.values())


def _with(recipe: Recipe, old: Edit, new: Edit) -> Recipe:
    """The recipe with one edit object in place of another."""

    def edit(given: Edit) -> Edit:
        return new if given is old else given

    def method(given: Method) -> Method:
        if not isinstance(given, Chain):
            return given
        return Chain(tuple(map(edit, given.edits)), method(given.codec))

    return replace(
        recipe,
        default=method(recipe.default),
        vectors=method(recipe.vectors),
        overrides=tuple((p, method(m)) for p, m in recipe.overrides),
        edits=tuple((p, edit(e)) for p, e in recipe.edits),
    )
