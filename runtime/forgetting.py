"""A model as it was before its first pass: without the tensors that it has put by.

A model may compute something of a parameter once and keep it in a plain attribute: a table of biases,
picked from the parameter and held for all later calls. From then on nobody is seen to read the
parameter, and moving it changes nothing, though a fine-tune of it answers otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from deltafold.runtime.uses import Chain, Uses

#: What torch keeps in a module's own attributes: tensors that are known, other modules, hooks.
_OF_TORCH = frozenset(vars(nn.Module()))
_PLAIN = (type, ModuleType, FunctionType, MethodType, str, int, float, torch.device, torch.dtype)
#: Objects within objects that are looked through for tensors.
_DEEPEST = 4


@dataclass(frozen=True)
class _Kept:
    """One attribute that holds tensors.

    Attributes:
        owner: what has it: a module, or an object that a module holds.
        name: of the attribute.
        value: what it holds.
    """

    owner: Any
    name: str
    value: Any

    def fill(self, value: Any) -> None:
        """Put a value in its place; no setter of a class has a say in it."""
        vars(self.owner)[self.name] = value

    @property
    def empty(self) -> Any:
        """What it may have been before the first pass."""
        if isinstance(self.value, torch.Tensor):
            return None
        if isinstance(self.value, tuple):
            return ()
        emptied = copy.copy(self.value)
        emptied.clear()
        return emptied


@torch.no_grad()
def forgotten_readers(
    model: nn.Module, inputs: dict[str, Any], tensors: Collection[int], seen: Uses
) -> dict[int, set[Chain]]:
    """Who reads which of `tensors` (given by `id`) in a first pass alone, and keeps what follows.

    Args:
        model: which has run before. It is as before when this returns.
        inputs: of a warm-up batch.
        tensors: of the model.
        seen: what a later pass has shown.

    Returns:
        Chains of module names, outermost first, as in `Uses.readers`. What is kept out of sight (in
        a closure, or a function's cache) is not found.
    """
    found: dict[int, set[Chain]] = {}
    for uses in _first_passes(list(_kept(model)), lambda: Uses.watch(model, inputs, tensors)):
        for tensor, chains in uses.readers.items():
            more = chains - seen.readers.get(tensor, set())
            if more:
                found.setdefault(tensor, set()).update(more)
    return found


def _first_passes(kept: list[_Kept], ask: Callable[[], Uses]) -> Iterator[Uses]:
    """Passes without what was put by: all of it, or as much at once as the model runs without.

    What a model was made with is not filled in again, and a pass without it fails.
    """
    by_class, by_name = _groups(kept, by_name=False), _groups(kept, by_name=True)
    for groups in ([kept] if kept else [], by_class, by_name):
        passes = [_without(group, ask) for group in groups]
        yield from (uses for uses in passes if uses is not None)
        if None not in passes:
            return


def _groups(kept: list[_Kept], *, by_name: bool) -> list[list[_Kept]]:
    found: dict[tuple[type, str], list[_Kept]] = {}
    for one in kept:
        found.setdefault((type(one.owner), one.name if by_name else ""), []).append(one)
    return list(found.values())


def _without(kept: list[_Kept], ask: Callable[[], Uses]) -> Uses | None:
    try:
        with _emptied(kept):
            return ask()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        return None


@contextmanager
def _emptied(kept: list[_Kept]) -> Iterator[None]:
    try:
        for one in kept:
            one.fill(one.empty)
        yield
    finally:
        for one in kept:
            one.fill(one.value)


def _kept(model: nn.Module) -> Iterator[_Kept]:
    known = {id(t) for t in (*model.parameters(), *model.buffers())}
    visited: set[int] = set()
    for module in model.modules():
        yield from _within(module, known, visited, 0)


def _within(owner: Any, known: set[int], visited: set[int], depth: int) -> Iterator[_Kept]:
    for name, value in list(vars(owner).items()):
        own = isinstance(owner, nn.Module) and name in _OF_TORCH
        if own or isinstance(value, (nn.Module, *_PLAIN)) or id(value) in visited:
            continue
        visited.add(id(value))
        if _holds(value, known):
            yield _Kept(owner, name, value)
        elif hasattr(value, "__dict__") and depth < _DEEPEST:
            yield from _within(value, known, visited, depth + 1)


def _holds(value: Any, known: set[int], depth: int = 0) -> bool:
    """Whether a value is or contains a tensor that is no parameter and no buffer."""
    if isinstance(value, torch.Tensor):
        return id(value) not in known
    if depth > _DEEPEST or not isinstance(value, dict | list | tuple | set):
        return False
    members = value.values() if isinstance(value, dict) else value
    return any(_holds(member, known, depth + 1) for member in members)
