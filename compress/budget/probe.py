"""What a recipe makes of a fine-tune, without writing it, and how far that is from the fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deltafold.compress.budget.allocate import Choice
from deltafold.compress.budget.options import same
from deltafold.compress.budget.survey import prepared
from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.encode import encode_tensor, settled_value
from deltafold.compress.evidence import EvidenceSource, follower
from deltafold.compress.recipe import Recipe
from deltafold.compress.terms import is_exact


class Measured(Protocol):
    """A model beside its fine-tune: mean KL divergence, in nats a token, and all other figures."""

    @property
    def kl(self) -> float:
        """KL(fine-tune || model), in nats, mean over the asked tokens."""
        ...

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        ...


class Judge(Protocol):
    """Runs models on a calibration set."""

    def measure(self, tensors: Mapping[str, torch.Tensor]) -> Measured:
        """A model, given by all its tensors, beside the fine-tune."""
        ...

    def record(self) -> dict[str, Any]:
        """What a manifest says about the data."""
        ...


@dataclass(frozen=True)
class Probe:
    """Measures choices without writing them.

    Attributes:
        source: the base.
        target: the fine-tune.
        recipe_of: the recipe of a choice.
        judge: runs the model.
        evidence: for codecs that need some.
    """

    source: TensorSource
    target: TensorSource
    recipe_of: Callable[[Choice], Recipe]
    judge: Judge
    evidence: EvidenceSource | None = None

    def kl(self, choice: Choice) -> float:
        """KL of a choice to the fine-tune, in nats a token."""
        recipe = self.recipe_of(choice)
        return self.judge.measure(rebuilt(self.source, self.target, recipe, self.evidence)).kl


def rebuilt(
    source: TensorSource,
    target: TensorSource,
    recipe: Recipe,
    evidence: EvidenceSource | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor as a delta packed by `recipe` would give it: float32, others as they are."""
    in_base = set(source.names())
    recipe = prepared(recipe, source, target, evidence)
    follows, names = follower(evidence), target.names()
    found = {}
    for name in follows.order(names) if follows else names:
        value = target.tensor(name)
        base = source.tensor(name) if name in in_base else None
        if same(value, base):
            found[name] = value
            continue
        encoded, _ = encode_tensor(name, value, base, recipe, evidence)
        exact = len(encoded) == 1 and is_exact(encoded[0].term)
        found[name] = value if exact else settled_value(name, encoded, value, base)
        if follows:
            follows.settle(name, found[name])
    return found
