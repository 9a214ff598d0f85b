"""What looks at the whole model before it does anything, where tensors are not packed but tried."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.encode import difference
from deltafold.compress.evidence import EvidenceSource
from deltafold.compress.methods import Method, spec_of
from deltafold.compress.methods.chain import looks_around
from deltafold.compress.recipe import Recipe
from deltafold.compress.survey import surveyed


def prepared(
    recipe: Recipe,
    source: TensorSource,
    target: TensorSource,
    evidence: EvidenceSource | None = None,
    *,
    only: Collection[str] | None = None,
) -> Recipe:
    """The recipe with whatever in it needs it told of the model's deltas.

    Args:
        recipe: how tensors will be packed.
        source: the base.
        target: the fine-tune.
        evidence: of a calibration run.
        only: tensors that there are; all if None.
    """

    def read(name: str) -> torch.Tensor:
        return difference(target.tensor(name), source.tensor(name))

    def left_out(name: str) -> object | None:
        return None if only is None or name in only else name

    return surveyed(recipe, source, target, read, evidence=evidence, given=left_out)


def told_of_all(
    candidates: Sequence[Method],
    recipe: Recipe,
    free: Collection[str],
    source: TensorSource,
    target: TensorSource,
    evidence: EvidenceSource | None,
) -> dict[str, Method]:
    """Candidates that look around, by spec, as if each were chosen for every free tensor.

    `recipe` was prepared; its edits come before the candidates.
    """
    return {
        spec_of(method): prepared(
            Recipe(default=method, edits=recipe.edits), source, target, evidence, only=free
        ).default
        for method in candidates
        if looks_around(method)
    }


def told_of_chosen(plain: Recipe, told: Recipe) -> dict[str, Method]:
    """Codecs of a prepared recipe by the spec that they had before they were told anything."""
    before = [plain.default, *(method for _, method in plain.overrides)]
    after = [told.default, *(method for _, method in told.overrides)]
    known: dict[str, Method] = {}
    for old, new in zip(before, after, strict=True):
        if looks_around(old):
            known.setdefault(spec_of(old), new)
    return known
