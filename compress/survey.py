"""Edits and codecs that must see the whole model before the first tensor is coded, run before packing.

Deltas are streamed: one tensor is in memory at a time, and the model is read as often as an edit asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import cast

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.edits import Edit, SurveyedEdit
from deltafold.compress.encode import context_of
from deltafold.compress.evidence import Evidence, EvidenceSource
from deltafold.compress.methods import Chain, Method, SurveyedMethod
from deltafold.compress.methods.chain import codec_of, looks_around, steps_of
from deltafold.compress.recipe import Recipe
from deltafold.compress.references import ReferenceSource, tensors_of
from deltafold.compress.terms import Context

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
    """The recipe with every surveyed edit and codec told of the whole model.

    An edit sees the deltas of the tensors that it will change, as the edits before it leave them; a
    codec those that it will store, as all edits leave them.

    Args:
        recipe: how the tensors will be packed.
        source: the base.
        target: the fine-tune.
        read: gives a tensor's delta.
        evidence: of a calibration run, for edits before a surveyed one.
        given: is not None for tensors that the recipe has no say in.
    """
    if not looks_at_all(recipe):
        return recipe
    names = [n for n in _edited(source, target) if given(n) is None]
    model = _Model(names, source, target, read, evidence)
    for edit in _all_edits(recipe):
        if isinstance(edit, SurveyedEdit):
            found = edit.survey(_SeenByEdit(model, recipe, edit))
            recipe = _with(recipe, edit, found)
    for codec in {id(c): c for c in map(codec_of, _methods(recipe))}.values():
        if isinstance(codec, SurveyedMethod):
            recipe = _with(recipe, codec, codec.survey(_SeenByCodec(model, recipe, codec)))
    return recipe


def looks_at_all(recipe: Recipe) -> bool:
    """Whether something in a recipe must see the whole model first."""
    return edits_look_around(recipe) or any(map(looks_around, _methods(recipe)))


def edits_look_around(recipe: Recipe) -> bool:
    """Whether one of a recipe's own edits must see the whole model first."""
    return any(isinstance(edit, SurveyedEdit) for _, edit in recipe.edits)


@dataclass(frozen=True)
class _Model:
    """Both models, and how they are read."""

    names: list[str]
    source: TensorSource
    target: TensorSource
    read: ReadDelta
    evidence: EvidenceSource | None

    def method(self, recipe: Recipe, name: str) -> Method:
        """What will store a tensor."""
        return recipe.method_for(name, self.target.spec(name).shape, floating=True)

    def edited(self, name: str, method: Method, steps: Sequence[Edit]) -> torch.Tensor:
        """A tensor's delta after some of its method's edits."""
        delta = self.read(name)[self._shared(name)]
        if steps:
            shared = self._shared(name)
            base, value = self.source.tensor(name)[shared], self.target.tensor(name)[shared]
            context = context_of(name, value, base, method, self.evidence)
            for step in steps:
                delta = step.apply(delta, context)
        return delta

    def context(self, name: str) -> Context:
        """A tensor's own: the base's and others of its name where there are reference checkpoints."""
        known = self.evidence
        if not (isinstance(known, ReferenceSource) and "reference" in known.provides):
            return Context(name)
        base = self.source.tensor(name)[self._shared(name)]
        # No more than these: moments would take passes over the data.
        return Context(name, base, evidence=Evidence(references=tensors_of(known.references, name)))

    def _shared(self, name: str) -> slice | EllipsisType:
        """The rows that both models have: others are stored as values."""
        shape = self.target.spec(name).shape
        rows = min(shape[:1] + self.source.spec(name).shape[:1], default=0)
        return slice(rows) if shape else ...


@dataclass(frozen=True)
class _SeenByEdit:
    """What one edit sees of the model; goes through it anew each time it is iterated."""

    model: _Model
    recipe: Recipe
    edit: Edit

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.model.names:
            method = self.model.method(self.recipe, name)
            steps = steps_of(method)
            place = next((i for i, step in enumerate(steps) if step is self.edit), None)
            if place is not None:
                yield name, self.model.edited(name, method, steps[:place])


@dataclass(frozen=True)
class _SeenByCodec:
    """The same for a codec; tensors without dimensions have a codec of their own."""

    model: _Model
    recipe: Recipe
    codec: Method

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Context]]:
        for name in self.model.names:
            method = self.model.method(self.recipe, name)
            if codec_of(method) is self.codec and self.model.target.spec(name).shape:
                delta = self.model.edited(name, method, steps_of(method))
                yield delta, self.model.context(name)


def _edited(source: TensorSource, target: TensorSource) -> list[str]:
    """Tensors whose difference to the base is edited: floating point, and in both."""
    both = set(source.names()) & set(target.names())
    return [n for n in sorted(both) if target.spec(n).dtype in dtypes.FLOATS]


def _methods(recipe: Recipe) -> list[Method]:
    return [recipe.default, recipe.vectors, *(m for _, m in recipe.overrides)]


def _all_edits(recipe: Recipe) -> list[Edit]:
    """Every edit object of a recipe once, in an order in which each follows those before it."""
    found = [e for _, e in recipe.edits] + [e for m in _methods(recipe) for e in steps_of(m)]
    return list({id(e): e for e in found}.values())


def _with(recipe: Recipe, old: Edit | Method, new: Edit | Method) -> Recipe:
    """The recipe with one edit or codec object in place of another."""

    def edit(given: Edit) -> Edit:
        return cast(Edit, new) if given is old else given

    def method(given: Method) -> Method:
        if not isinstance(given, Chain):
            return cast(Method, new) if given is old else given
        return Chain(tuple(map(edit, given.edits)), method(given.codec))

    return replace(
        recipe,
        default=method(recipe.default),
        vectors=method(recipe.vectors),
        overrides=tuple((p, method(m)) for p, m in recipe.overrides),
        edits=tuple((p, edit(e)) for p, e in recipe.edits),
    )
