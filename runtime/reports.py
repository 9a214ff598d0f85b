"""A pass with every module wrapped: each must report that it added its delta, or it was bypassed.

The pass before wrapping saw who reads each parameter. It cannot see that a hook which is in place is
never asked, since a model may call a module in a way that goes round its instance's `forward`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltafold.compress import DeltafoldError
from deltafold.runtime.batch import BatchState
from deltafold.runtime.layers import is_embedding, is_linear, is_transposed_linear, unwrap, wrap
from deltafold.runtime.layout import WARM_ROWS
from deltafold.runtime.warm_up import later_inputs

if TYPE_CHECKING:
    from deltafold.runtime.loading import LoadedVariant
    from deltafold.runtime.slots import Home


@dataclass(frozen=True)
class _Nothing:
    """A delta of zeros that takes no memory."""

    rows: int
    columns: int
    nbytes: int = 0

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), self.rows)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(index), self.columns, device=index.device)


@torch.no_grad()
def bypassed(
    model: nn.Module,
    inputs: dict[str, Any],
    homes: Collection[Home],
    later: frozenset[str] = frozenset(),
) -> set[str]:
    """Names of the modules that do not report, or cannot be run for some requests alone.

    Every other request of the warm-up batch runs a variant that changes all homes by nothing.

    Args:
        model: not wrapped.
        inputs: of the warm-up batch.
        homes: to be wrapped.
        later: modules that run, and must report, when the model goes on by one token.
    """
    try:
        return {h.name for h in homes} - _reported(model, inputs, homes, later)
    except (DeltafoldError, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        pass
    bad = set()
    for name in sorted({h.name for h in homes}):
        try:
            if name not in _reported(model, inputs, [h for h in homes if h.name == name], later):
                bad.add(name)
        except (DeltafoldError, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            bad.add(name)
    return bad


def _reported(
    model: nn.Module, inputs: dict[str, Any], homes: Collection[Home], later: frozenset[str]
) -> set[str]:
    variant = _unchanged(homes)
    state = BatchState(next(model.parameters()).device)
    modules = {h.name: h for h in homes}
    try:
        for name, home in modules.items():
            wrap(name, home.module, state, home.layout)
        with state.running([(None if i % 2 else variant, 1.0) for i in range(WARM_ROWS)]):
            state.reports = set()
            output = model(**inputs)
            reported = state.reports
            more = later_inputs(inputs, output) if later & reported else None
            if more is not None:
                state.reports = set()
                model(**more)
                reported -= later - state.reports
            return reported
    finally:
        for home in modules.values():
            unwrap(home.module)


def _unchanged(homes: Collection[Home]) -> LoadedVariant:
    from deltafold.runtime.loading import LoadedVariant

    variant = LoadedVariant("warm-up", Path())
    for home in homes:
        module = home.module
        product = is_linear(module) or is_transposed_linear(module)
        if product and home.path == "weight":
            variant.products[home.name] = _Nothing(_outputs(module), 0)
        elif product:
            variant.add_vector(home, torch.zeros_like(_parameter(home), dtype=torch.float32))
        elif is_embedding(module):
            variant.tables[home.name] = _Nothing(0, _parameter(home).shape[1])
        else:
            variant.add_vector(home, torch.empty(_parameter(home).shape, device="meta"))
    return variant


def _outputs(module: nn.Module) -> int:
    found = getattr(module, "out_features", None)
    if isinstance(found, int):
        return found
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1]


def _parameter(home: Home) -> torch.Tensor:
    *inner, attribute = home.path.split(".")
    value = getattr(home.module.get_submodule(".".join(inner)), attribute)
    assert isinstance(value, torch.Tensor)
    return value
