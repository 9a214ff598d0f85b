"""Merging by elected signs, which TIES brought and others share.

Source: Yadav et al., TIES-Merging (arXiv 2306.01708), section 4, steps 2 and 3, and the authors'
released code for entries whose sum is exactly zero: they take the sign that most entries of the whole
model have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.merges.base import weighted_sum
from deltafold.compress.terms import Context

#: Makes a model's delta of one tensor sparse: the model's number, the delta, its context.
Sparsify: TypeAlias = Callable[[int, torch.Tensor, Context], torch.Tensor]


@dataclass(frozen=True)
class Election:
    """Sparsify each delta, elect a sign for each entry, average the entries that have it.

    Attributes:
        sparsify: what becomes of each model's delta first.
        majority: -1, 0 or 1, the sign of entries whose weighted sum is zero.
        scale: factor of the result, lambda.
    """

    sparsify: Sparsify
    majority: float
    scale: float

    def merge(
        self, deltas: Sequence[torch.Tensor], weights: Sequence[float], context: Context
    ) -> torch.Tensor:
        """`scale` times the mean over the models that agree with the elected sign, float32."""
        sparse = [self.sparsify(t, delta, context) for t, delta in enumerate(deltas)]
        sign = weighted_sum(sparse, weights).sign_()
        sign = torch.where(sign == 0, self.majority, sign)
        total, count = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, weight in zip(sparse, weights, strict=True):
            agrees = delta * sign > 0
            total += torch.where(agrees, weight * delta, 0.0)
            count += torch.where(agrees, weight, 0.0)
        return torch.where(count > 0, total / count, 0.0) * self.scale


def hold_election(
    sparsify: Sparsify,
    deltas: Iterable[tuple[str, Sequence[torch.Tensor]]],
    weights: Sequence[float],
    scale: float,
) -> Election:
    """The election once the majority of the whole models is known; reads them once.

    Raises:
        DeltafoldError: `bad-argument` where a weight is not positive.
    """
    if not all(w > 0 for w in weights):
        raise DeltafoldError(
            "bad-argument",
            "signs are elected by positive weights only.",
            facts=[("weights", ", ".join(map(str, weights)))],
            fix="leave a delta out instead of giving it no weight",
        )
    balance = 0.0
    for name, several in deltas:
        sparse = [sparsify(t, delta, Context(name)) for t, delta in enumerate(several)]
        balance += weighted_sum(sparse, weights).sign_().sum(dtype=torch.float64).item()
    return Election(sparsify, float((balance > 0) - (balance < 0)), scale)
