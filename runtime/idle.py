"""Which answers a parameter has a say in, found by moving it and asking the model again.

A fine-tune may have changed parameters that no request ever feels: the token that stands for masked
patches while a model is trained, the scale of scores that nobody asked for. To serve such a fine-tune
as its dense model would answer, there is nothing to do for them, and that has to be shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deltafold.runtime.uses import Answers, disturbed


@torch.no_grad()
def reached(
    model: nn.Module, inputs: dict[str, Any], answers: Answers, tensors: Mapping[str, torch.Tensor]
) -> set[str]:
    """Places of the answers that change by a bit when all of `tensors` are moved at once.

    All places where the model does not run with other values. Writes to the tensors while it runs, so
    nothing else may use the model meanwhile.
    """
    plain = answers.of(model(**inputs))
    try:
        with _moved(tensors):
            found = answers.of(model(**inputs))
    except (RuntimeError, ValueError, IndexError, KeyError):
        return set(answers.places)
    pairs = zip(answers.places, plain, found, strict=True)
    return {place for place, p, f in pairs if not torch.equal(p, f)}


def idle(
    model: nn.Module, inputs: dict[str, Any], answers: Answers, tensors: Mapping[str, torch.Tensor]
) -> set[str]:
    """Names of the tensors that have no say in any answer."""
    if not tensors or not reached(model, inputs, answers, tensors):
        return set(tensors)
    return {n for n, t in tensors.items() if not reached(model, inputs, answers, {n: t})}


@torch.no_grad()
def dispensable(
    model: nn.Module, inputs: dict[str, Any], answers: Answers, place: str
) -> frozenset[str]:
    """Names of the saved tensors in those parts of a model whose output does not reach one answer."""
    names: set[str] = set()
    plain = dict(zip(answers.places, answers.of(model(**inputs)), strict=True))[place]
    for part, module in model.named_children():
        try:
            with disturbed({part: module}):
                found = answers.of(model(**inputs))
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError):
            continue
        if torch.equal(dict(zip(answers.places, found, strict=True))[place], plain):
            names |= {f"{part}.{name}" for name in module.state_dict()}
    return frozenset(names)


@contextmanager
def _moved(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            flat = tensor.data
            if tensor.is_floating_point():
                wave = torch.arange(flat.numel(), device=flat.device).remainder(3) - 0.5
                size = flat.float().abs().mean() * 0.5 + 0.05
                flat.copy_((flat.float() + wave.reshape(flat.shape) * size).to(flat.dtype))
            else:
                flat.add_(1)
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data.copy_(kept[name])
