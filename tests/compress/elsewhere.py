"""A second device on a machine that has only a CPU, to find out what would break on a GPU.

Its tensors are real ones, computed with as ever, but they call themselves `meta` tensors. As on a GPU,
they mix with no tensor of the CPU (but for single numbers), and their memory cannot be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(torch.Tensor):
    """A tensor of that device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """The device, while it is there."""
    with _Mode():
        yield DEVICE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = tree_flatten((args, kwargs))[0]
    there = [t for t in given if isinstance(t, There)]
    here = [
        t for t in given if isinstance(t, torch.Tensor) and not isinstance(t, There) and t.dim()
    ]
    if there and here and func not in _MOVES:
        raise RuntimeError(f"{func}: tensors on two devices")
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    goes_there = bool(there) if device is None else torch.device(device) == DEVICE
    if func is torch.ops.aten.copy_.default:
        goes_there = isinstance(args[0], There)
    names = {id(t.inner): t for t in there}
    plain = tree_map(lambda t: t.inner if isinstance(t, There) else t, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if not goes_there:
        return found

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # What works in place returns the tensor itself.
        return names.get(id(value)) if id(value) in names else There(value)

    return tree_map(wrapped, found)
