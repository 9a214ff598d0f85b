"""Where a change of the weights changes the loss: the loss difference, split by tensor.

Source: arXiv 2410.13841, section 3. For weights `W`, a change `P` and a loss `L`,

    L(W + P) - L(W) = int_0^1 <grad L(W + t P), P> dt
                   ~= (1/C) sum_{c=0}^{C-1} <grad L(W + (c/C) P), P>,

the left Riemann sum. The inner product is a sum over tensors, which is what it is good for: the whole
is known from two forward passes. For a quadratic loss with Hessian H the sum falls short of the
difference by `(1/2C) P^T H P`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from deltafold.compress.calibration.data import CalibrationSet
from deltafold.compress.calibration.evidence import grouped
from deltafold.compress.calibration.quality import batch_logits, predictions

#: Bytes that one group's gradients may take, and the paper's number of steps.
GROUP_BYTES: Final = 2 * 2**30
STEPS: Final = 5
_ROWS: Final = 8


def loss_terms(
    model: Any,
    change: Mapping[str, torch.Tensor],
    data: CalibrationSet,
    *,
    steps: int = STEPS,
    group_bytes: int = GROUP_BYTES,
) -> dict[str, float]:
    """The Riemann sum of every parameter; together they approximate the loss difference.

    Gradients are taken of one group of parameters at a time and reduced to one number each at once, so
    that a model needs its weights, the change and one group's gradients in memory. Each group costs
    `steps` passes over the data.

    Args:
        model: at W, in evaluation mode. It is moved along P, and left close to W + P.
        change: P, by parameter name; parameters that are not named stay.
        data: the loss is the mean over its asked tokens.
        steps: C.
        group_bytes: most memory for the gradients of a group.

    Returns:
        By parameter name, in nats.
    """
    parameters = {n: p for n, p in model.named_parameters() if n in change}
    cost = {n: p.numel() * p.element_size() for n, p in parameters.items()}
    groups = sorted(set(grouped(cost, cost.__getitem__, group_bytes).values()))
    terms = dict.fromkeys(parameters, 0.0)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for _ in range(steps):
            for group in groups:
                slopes = _slopes(model, {n: parameters[n] for n in group}, change, data)
                for name, slope in slopes.items():
                    terms[name] += slope / steps
            _move(parameters, change, 1 / steps)
    finally:
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
    return terms


@torch.no_grad()
def difference(model: Any, other: Any) -> dict[str, torch.Tensor]:
    """`other - model` by parameter; `other`'s own parameters are overwritten with it.

    Raises:
        KeyError: where the two are not of one architecture.
    """
    changed = {}
    start = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        parameter.sub_(start[name])
        if bool(parameter.any()):
            changed[name] = parameter.detach()
    return changed


def _slopes(
    model: Any,
    group: Mapping[str, torch.nn.Parameter],
    change: Mapping[str, torch.Tensor],
    data: CalibrationSet,
) -> dict[str, float]:
    """`<grad L, P>` of a group's parameters where the model stands."""
    ours = {id(p) for p in group.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ours)
    device = next(model.parameters()).device
    sums = dict.fromkeys(group, 0.0)
    for batch in data.batches(_ROWS):
        moved = batch.to(device)
        found = predictions(batch_logits(model, moved), moved)
        loss = torch.nn.functional.cross_entropy(found.logits, found.targets, reduction="sum")
        slopes = torch.autograd.grad(loss, list(group.values()), allow_unused=True)
        for name, slope in zip(group, slopes, strict=True):
            if slope is not None:
                sums[name] += _inner(slope, change[name]) / data.predicted
    return sums


def _inner(first: torch.Tensor, second: torch.Tensor) -> float:
    product = first.to(torch.float32) * second.to(torch.float32)
    return float(product.sum(dtype=torch.float64))


@torch.no_grad()
def _move(
    parameters: Mapping[str, torch.nn.Parameter], change: Mapping[str, torch.Tensor], by: float
) -> None:
    for name, parameter in parameters.items():
        parameter.add_(change[name], alpha=by)


def total(terms: Mapping[str, float]) -> float:
    """The sum over tensors."""
    return sum(terms.values())


def worst(terms: Mapping[str, float], count: int = 5) -> Sequence[tuple[str, float]]:
    """The parameters that raise the loss most."""
    return sorted(terms.items(), key=lambda item: -item[1])[:count]
