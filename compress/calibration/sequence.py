"""In which order a model calls its layers, and which of them are given the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from deltafold.compress.calibration.batches import Batch


@torch.no_grad()
def stages(
    model: Any, layers: Mapping[str, list[torch.nn.Module]], batch: Batch
) -> list[tuple[str, ...]]:
    """Tensors in the order in which a forward pass multiplies by them.

    Args:
        model: in evaluation mode.
        layers: the modules that multiply by each tensor, by the tensor's name.
        batch: what is run, on the model's device.

    Returns:
        Groups of tensors whose layers are called one after the other with the very same inputs: those
        cannot see each other's errors. Layers that were not called come last.
    """
    calls: list[tuple[str, int]] = []
    inputs: list[torch.Tensor] = []  # kept, so that no id is given twice
    handles = [
        module.register_forward_pre_hook(_note(name, calls, inputs), with_kwargs=True)
        for name, modules in layers.items()
        for module in modules
    ]
    try:
        model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found: list[list[str]] = []
    seen: set[str] = set()
    before = None
    for name, given in calls:
        if name in seen:
            continue
        seen.add(name)
        if given == before:
            found[-1].append(name)
        else:
            found.append([name])
        before = given
    rest = sorted(set(layers) - seen)
    return [tuple(sorted(stage)) for stage in (*found, rest) if stage]


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A layer's input among the arguments of its call."""
    values = (*args, *kwargs.values())
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def _note(
    name: str, calls: list[tuple[str, int]], inputs: list[torch.Tensor]
) -> Callable[..., None]:
    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = first_tensor(args, kwargs)
        if value is not None:
            inputs.append(value)
            calls.append((name, id(value)))

    return note
