"""Edits that look at the whole model first, for those who code tensors without packing them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.edits import SurveyedEdit
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.recipe import Recipe


def prepared(recipe: Recipe, source: TensorSource, target: TensorSource) -> Recipe:
    """The recipe with its surveyed edits told of the model's deltas.

    Raises:
        DeltafoldError: `bad-argument` for a codec that follows the tensors packed before it: there are
            none where tensors are coded by themselves.
    """
    if "sequential" in recipe.needs():
        raise DeltafoldError(
            "bad-argument",
            "a codec that follows the tensors before it can only be packed with, not tried.",
            fix="take it out of the budget's candidates, or do without --dry-run",
        )
    deltas = _Deltas(source, target)
    edits = [
        (pattern, edit.survey(deltas) if isinstance(edit, SurveyedEdit) else edit)
        for pattern, edit in recipe.edits
    ]
    return replace(recipe, edits=tuple(edits))


@dataclass(frozen=True)
class _Deltas:
    """Every delta by name, one at a time; as often as they are asked for."""

    source: TensorSource
    target: TensorSource

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(set(self.source.names()) & set(self.target.names())):
            spec = self.target.spec(name)
            if spec.dtype not in dtypes.FLOATS or not spec.shape:
                continue
            rows = min(spec.shape[0], self.source.spec(name).shape[0])
            delta = self.target.tensor(name)[:rows].to(torch.float32)
            yield name, delta - self.source.tensor(name)[:rows].to(torch.float32)
