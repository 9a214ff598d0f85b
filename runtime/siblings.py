"""Linear layers that a model gives the same input (q, k and v; gate and up), served by one launch.

Which they are is found by watching a warm-up pass: layers of one module that were called once each,
with the very same tensor, which nobody changed in between. While a batch runs, the first of them to be
called computes the base's outputs of all, by each layer's own forward, and adds the deltas to all of
them at once; the others then return what is ready. A layer that gets another tensor after all, or is
called again, computes by itself: no result depends on the guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltafold.runtime.batch import BatchState
from deltafold.runtime.packed import PackedLayers

if TYPE_CHECKING:
    from deltafold.runtime.layers import LinearHook

#: Layers that one launch serves (`kernels.triton.parts.MOST_PARTS`, which needs Triton to be read).
MOST: int = 4


@torch.no_grad()
def find_siblings(
    model: nn.Module, inputs: dict[str, Any], layers: Mapping[str, nn.Module]
) -> list[tuple[str, ...]]:
    """Names of layers that get the same input, in the order in which they are called.

    Args:
        model: the model, in eval mode.
        inputs: keyword arguments of a forward pass.
        layers: linear layers by name.
    """
    # Inputs are kept, so that no later tensor has the address of an earlier one.
    seen: dict[str, list[tuple[torch.Tensor, int]]] = {name: [] for name in layers}
    handles = [
        module.register_forward_pre_hook(_noting(seen[name])) for name, module in layers.items()
    ]
    order: list[str] = []
    handles += [m.register_forward_pre_hook(_naming(order, n)) for n, m in layers.items()]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[str, int, int], list[str]] = {}
    for name in dict.fromkeys(order):
        if len(seen[name]) == 1 == order.count(name):
            ((x, version),) = seen[name]
            parent = name.rpartition(".")[0]
            groups.setdefault((parent, id(x), version), []).append(name)
    return [
        tuple(names[start : start + MOST])
        for names in groups.values()
        for start in range(0, len(names), MOST)
        if len(names[start : start + MOST]) > 1
    ]


def _noting(calls: list[tuple[torch.Tensor, int]]) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], torch.Tensor) and not args[0].is_inference():
            calls.append((args[0], args[0]._version))

    return note


def _naming(order: list[str], name: str) -> Any:
    def note(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        order.append(name)

    return note


class Siblings:
    """The hooks of layers that get the same input, and the outputs that are ready for them."""

    def __init__(self, state: BatchState) -> None:
        self._state = state
        self._hooks: dict[str, LinearHook] = {}
        self._layers: PackedLayers | None = None
        self._x: torch.Tensor | None = None
        self._epoch = -1
        self._ready: dict[str, torch.Tensor] = {}

    def join(self, name: str, hook: LinearHook) -> None:
        """A layer was wrapped."""
        self._hooks[name] = hook
        self._layers = None

    def output(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """A layer's output with all deltas added, or None where it shall compute by itself."""
        if x is not self._x or self._epoch != self._state.epoch or name not in self._ready:
            self._x, self._ready = None, {}
            if len(self._hooks) < 2 or x.shape[0] == 1 != self._state.size:
                return None
            self._compute(x)
        found = self._ready.pop(name)
        if not self._ready:
            self._x = None
        return found

    def _compute(self, x: torch.Tensor) -> None:
        names = tuple(self._hooks)
        if self._layers is None:
            self._layers = PackedLayers(names, self._state)
        ys = [self._hooks[name].base(x) for name in names]
        rows, each = self._state.rows_in(x.shape[0], names[0])
        done = self._layers.add(x, ys, rows, each)
        self._x, self._epoch = x, self._state.epoch
        self._ready = dict(zip(names, done, strict=True))


def siblings_of(groups: Iterable[Sequence[str]], state: BatchState) -> dict[str, Siblings]:
    """By the name of a layer, what it shares with the others of its group."""
    found: dict[str, Siblings] = {}
    for names in groups:
        found |= dict.fromkeys(names, Siblings(state))
    return found
