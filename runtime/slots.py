"""Where a checkpoint's tensors live in a model: parameters, their owners, and who reads them.

Names, identity and content decide, no list of architectures. A slot is one parameter of one module; a
tied parameter has several. A warm-up pass finds out which modules read each parameter and how their
inputs lay out the batch, so that a delta that would have no effect is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltafold.runtime.forgetting import forgotten_readers
from deltafold.runtime.idle import idle
from deltafold.runtime.layers import is_embedding, is_linear, is_transposed_linear
from deltafold.runtime.layout import Layout
from deltafold.runtime.quantized import is_quantized
from deltafold.runtime.regions import Region, find_region
from deltafold.runtime.renaming import renaming
from deltafold.runtime.replay import rehearse
from deltafold.runtime.reports import bypassed
from deltafold.runtime.siblings import find_siblings
from deltafold.runtime.uses import Answers, Uses, mixing

#: Largest parameter that is moved to see whether its module can be run again for some requests.
_REHEARSED_BELOW = 2**22

#: Of looking for homes; each sends some parameters to a module further out.
_MOST_ROUNDS = 6


@dataclass(frozen=True)
class Slot:
    """One parameter or buffer of one module.

    Attributes:
        name: full name, e.g. `model.layers.0.self_attn.q_proj.weight`.
        module: its owner.
        module_name: the owner's name.
        attribute: its name in the owner.
        tensor: the base's own value. Kept, because hooks lend modules other values while they run.
    """

    name: str
    module: nn.Module
    module_name: str
    attribute: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Home:
    """The module that is wrapped to serve one slot: its owner, or one around it.

    Attributes:
        name: of the module.
        module: which runs with each variant's value.
        path: of the parameter from there, e.g. `weight` or `gate.bias`.
        layout: of the module's calls.
    """

    name: str
    module: nn.Module
    path: str
    layout: Layout

    @property
    def size(self) -> int:
        """Elements of the parameter."""
        *inner, attribute = self.path.split(".")
        value: torch.Tensor = getattr(self.module.get_submodule(".".join(inner)), attribute)
        return value.numel()

    @property
    def own(self) -> bool:
        """Whether the module itself owns the parameter."""
        return "." not in self.path


class SlotMap:
    """All slots of a model, by tensor name, with ties resolved."""

    def __init__(self, model: nn.Module) -> None:
        self.slots: dict[str, Slot] = {}
        self._tied: dict[int, list[str]] = {}
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        for module_name, module in self._modules.items():
            for attribute, value in _own_tensors(module):
                name = f"{module_name}.{attribute}" if module_name else attribute
                self.slots[name] = Slot(name, module, module_name, attribute, value)
                self._tied.setdefault(id(value), []).append(name)
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        self._rename = renaming(model)
        self._found: dict[str, str | None] = {}
        self._uses = Uses()
        self._bad: set[str] = set()
        self._captured: set[int] = set()
        self._idle: set[str] = set()
        self._regions: dict[str, Region | None] = {}
        self.vocabulary = _vocabulary_modules(model, self.slots.values())

    def find(self, tensor: str) -> str | None:
        """The slot that a checkpoint's tensor belongs to: its own name or the one that the loader
        gives it, also with the prefix that transformers adds or drops between a bare model and one
        with a head.
        """
        if tensor not in self._found:
            candidates = [tensor]
            if self._prefix:
                candidates += [f"{self._prefix}.{tensor}", tensor.removeprefix(f"{self._prefix}.")]
            candidates += [self._rename(name) for name in candidates]
            self._found[tensor] = next((n for n in candidates if n in self.slots), None)
        return self._found[tensor]

    def region(self, tensor: str, value: torch.Tensor, names: Iterable[str]) -> Region | None:
        """The part of a parameter that holds a tensor whose name or layout the model changed.

        Args:
            tensor: its name in the checkpoint.
            value: the base's value.
            names: all names of the base's checkpoint; their slots are not looked through, but for
                the tensor's own.
        """
        if tensor not in self._regions:
            own = self.find(tensor)
            taken = {self.find(n) for n in names} - {own}
            free = [(n, s.tensor) for n, s in self.slots.items() if n not in taken]
            self._regions[tensor] = find_region(tensor, value, free)
        return self._regions[tensor]

    def module(self, name: str) -> nn.Module:
        """A module by its name."""
        return self._modules[name]

    def tied_to(self, name: str) -> list[str]:
        """Every slot that holds the same parameter, `name` included."""
        return self._tied[id(self.slots[name].tensor)]

    @torch.no_grad()
    def observe(self, model: nn.Module, inputs: dict[str, Any], *, find_idle: bool = False) -> None:
        """Run warm-up passes: who reads which parameter, and which modules keep requests apart.

        Args:
            model: the model, in eval mode.
            inputs: keyword arguments of a forward pass, as `warm_up_inputs` gives them.
            find_idle: look for parameters that have no say in any answer. Right where requests use
                no other inputs than these.
        """
        answers = Answers.observe(model, inputs)
        self._uses = Uses.watch(model, inputs, self._tied)
        later = self._uses.watch_later(model, inputs, self._tied)
        saved = [n for n in model.state_dict() if n in self.slots]
        # A module that mixes requests, or whose hook is passed by, sends its parameters to one around.
        for _ in range(_MOST_ROUNDS):
            found = {h.name: h.module for name in saved for h in self.homes(name)}
            bad = mixing(model, inputs, found, self._uses.layouts, answers)
            homes = [h for name in saved for h in self.homes(name) if _is_risky(h)]
            bad |= rehearse(model, inputs, [h for h in homes if h.name not in bad], answers)
            if not bad:
                bad = bypassed(model, inputs, [h for n in saved for h in self.homes(n)], later)
            if not bad:
                break
            self._bad |= bad
        else:
            # The homes further out have not been tried, and are not looked for any longer.
            moved = [n for n in saved if any(h.name not in found for h in self.homes(n))]
            self._captured |= {id(self.slots[n].tensor) for n in moved}
        self._captured |= self._kept_elsewhere(model, inputs) | self._put_by(model, inputs)
        if find_idle:
            homeless = {n: self.slots[n].tensor for n in saved if self._may_be_idle(n)}
            self._idle = idle(model, inputs, answers, homeless)

    def siblings(self, model: nn.Module, inputs: dict[str, Any]) -> list[tuple[str, ...]]:
        """Names of linear layers that get the same input, after `observe`."""
        layers = {
            name: module
            for name, module in self._modules.items()
            if is_linear(module) or is_transposed_linear(module)
        }
        return find_siblings(model, inputs, layers)

    def is_idle(self, names: Iterable[str]) -> bool:
        """Whether the parameters of these slots have no say in any answer."""
        return set(names) <= self._idle

    def _may_be_idle(self, name: str) -> bool:
        """Whether a parameter has no home, and moving it in a warm-up batch tells something.

        A module that did not run is perhaps for other tokens, and what a model has computed of a
        parameter in its first pass does not move any more.
        """
        ties = self.tied_to(name)
        ran = any(self.slots[n].module_name in self._uses.layouts for n in ties)
        tensor = id(self.slots[name].tensor)
        read = tensor in self._uses.readers
        served = any(self.homes(tied) for tied in ties)
        return (ran or read) and tensor not in self._captured and not served

    def homes(self, name: str) -> list[Home]:
        """The modules to wrap for a slot; empty where a variant's value cannot be brought in.

        A parameter that is tied elsewhere, and read there alone, has no home under this name.
        """
        slot = self.slots[name]
        tensor = id(slot.tensor)
        ties = self._tied[tensor]
        owners = {self.slots[n].module_name for n in ties}
        homes: dict[str, Home] = {}
        for chain in self._uses.readers.get(tensor, ()):
            own = slot.module_name in chain
            if not own and (owners & set(chain) or name != ties[0]):
                continue
            home = self._home(slot, chain)
            if home is None or tensor in self._captured:
                return []
            homes[home.name] = home
        return [h for h in homes.values() if not any(_inside(h.name, o) for o in homes)]

    def reading(self, name: str) -> list[str]:
        """Names of the innermost modules that read a slot's parameter, for error messages."""
        chains = self._uses.readers.get(id(self.slots[name].tensor), ())
        return sorted({c[-1] for c in chains if c})

    def _home(self, slot: Slot, chain: tuple[str, ...]) -> Home | None:
        for module_name in reversed(chain):
            if not (module_name and slot.name.startswith(f"{module_name}.")):
                continue
            if is_quantized(slot.module) and module_name != slot.module_name:
                # A module around it could only be lent codes, which no difference can be added to.
                continue
            layout = self._uses.layouts.get(module_name)
            module = self._modules[module_name]
            if layout is None or module_name in self._bad or not layout.repeatable:
                continue
            return Home(module_name, module, slot.name[len(module_name) + 1 :], layout)
        return None

    def _put_by(self, model: nn.Module, inputs: dict[str, Any]) -> set[int]:
        """Parameters that somebody read in the first pass only, and kept what he made of them."""
        found = forgotten_readers(model, inputs, self._tied, self._uses)
        for tensor, chains in found.items():
            self._uses.readers.setdefault(tensor, set()).update(chains)
        return set(found)

    def _kept_elsewhere(self, model: nn.Module, inputs: dict[str, Any]) -> set[int]:
        """Parameters that somebody reads from a place of his own, where no other value gets in."""
        alias = {t: self.slots[names[0]].tensor.detach() for t, names in self._tied.items()}
        swapped = {n: alias[t] for t, names in self._tied.items() for n in names}
        with _values(self.slots, swapped):
            uses = Uses.watch(model, inputs, self._tied)
            uses.watch_later(model, inputs, self._tied)
            return set(uses.readers)


class _values:  # noqa: N801
    """Within it, slots hold other tensors of equal value."""

    def __init__(self, slots: dict[str, Slot], values: dict[str, torch.Tensor]) -> None:
        self._slots, self._values = slots, values
        self._old: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        for name, value in self._values.items():
            slot = self._slots[name]
            parameters = slot.module._parameters
            home: dict[str, Any] = (
                parameters if slot.attribute in parameters else slot.module._buffers
            )
            self._old.append((home, slot.attribute, home[slot.attribute]))
            home[slot.attribute] = value

    def __exit__(self, *_: object) -> None:
        for home, attribute, value in self._old:
            home[attribute] = value


def _is_risky(home: Home) -> bool:
    """Whether only a rehearsal tells that the home's module can be run again for some requests."""
    if home.layout.cached:
        return True
    plain = is_linear(home.module) or is_transposed_linear(home.module) or is_embedding(home.module)
    # A rehearsal holds the parameter three times over, which experts may be too large for.
    return home.layout.guessed and not plain and home.size <= _REHEARSED_BELOW


def _inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _vocabulary_modules(model: nn.Module, slots: Iterable[Slot]) -> set[int]:
    """`id` of the modules that read and write tokens, those with a tied table included."""
    found, tables = set(), set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            found.add(id(module))
            tables.add(id(getattr(module, "weight", None)))
    return found | {id(slot.module) for slot in slots if id(slot.tensor) in tables}


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    own: list[tuple[str, torch.Tensor]] = list(
        module.named_parameters(recurse=False, remove_duplicate=False)
    )
    return own + list(module.named_buffers(recurse=False, remove_duplicate=False))
