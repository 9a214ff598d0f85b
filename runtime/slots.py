"""Where a checkpoint's tensors live in a model: parameters, their owners, and who is ever called.

Names and identity decide, no list of architectures. A slot is one parameter of one module; a tied
parameter has several. A warm-up pass finds out which owners the model really calls and how their
inputs lay out the batch, so that a delta that would have no effect is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: A warm-up batch whose sizes cannot be confused: 3 requests of 2 tokens.
_WARM_ROWS, _WARM_TOKENS = 3, 2


@dataclass(frozen=True)
class Slot:
    """One parameter or buffer of one module.

    Attributes:
        name: full name, e.g. `model.layers.0.self_attn.q_proj.weight`.
        module: its owner.
        module_name: the owner's name.
        attribute: its name in the owner.
    """

    name: str
    module: nn.Module
    module_name: str
    attribute: str

    @property
    def tensor(self) -> torch.Tensor:
        """The base's own value."""
        value = getattr(self.module, self.attribute)
        assert isinstance(value, torch.Tensor)
        return value


class SlotMap:
    """All slots of a model, by tensor name, with ties resolved."""

    def __init__(self, model: nn.Module) -> None:
        self.slots: dict[str, Slot] = {}
        self._tied: dict[int, list[str]] = {}
        for module_name, module in model.named_modules():
            for attribute, value in _own_tensors(module):
                name = f"{module_name}.{attribute}" if module_name else attribute
                self.slots[name] = Slot(name, module, module_name, attribute)
                self._tied.setdefault(id(value), []).append(name)
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        self.called: dict[str, bool] = {}

    def find(self, tensor: str) -> str | None:
        """The slot that a checkpoint's tensor belongs to: its own name, or with the prefix that
        transformers adds or drops between a bare model and one with a head.
        """
        candidates = [tensor]
        if self._prefix:
            candidates += [f"{self._prefix}.{tensor}", tensor.removeprefix(f"{self._prefix}.")]
        return next((name for name in candidates if name in self.slots), None)

    def module(self, name: str) -> nn.Module:
        """A module that owns slots, by its name."""
        return next(s.module for s in self.slots.values() if s.module_name == name)

    def tied_to(self, name: str) -> list[str]:
        """Every slot that holds the same parameter, `name` included."""
        return self._tied[id(self.slots[name].tensor)]

    @torch.no_grad()
    def observe(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run a warm-up pass and note which owners are called with the batch in their first dimension.

        Args:
            model: the model, in eval mode.
            inputs: keyword arguments of a forward pass over a batch of `warm_up_shape()`.
        """
        owners = {s.module_name: s.module for s in self.slots.values()}
        handles = []
        for name, module in owners.items():

            def note(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], n: str = name
            ) -> None:
                self.called[n] = self.called.get(n, True) and _keeps_batch(
                    [*args, *kwargs.values()]
                )

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        try:
            model(**inputs)
        finally:
            for handle in handles:
                handle.remove()


def warm_up_shape() -> tuple[int, int]:
    """Batch rows and tokens of the warm-up pass."""
    return _WARM_ROWS, _WARM_TOKENS


def _keeps_batch(values: Iterable[Any]) -> bool:
    first = next((v for v in values if isinstance(v, torch.Tensor) and v.dim()), None)
    return first is not None and first.shape[0] in (_WARM_ROWS, _WARM_ROWS * _WARM_TOKENS)


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    own: list[tuple[str, torch.Tensor]] = list(
        module.named_parameters(recurse=False, remove_duplicate=False)
    )
    return own + list(module.named_buffers(recurse=False, remove_duplicate=False))
