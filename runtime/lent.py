"""A stacked parameter with a variant's delta, lent to a module while it runs for this variant.

A module of experts reads its parameter `[E, A, B]` by expert: it takes a matrix and multiplies by it,
or hands all of them to a grouped product. `Lent` is the base's parameter that answers such products
with the delta added, in whatever form that is; nobody makes the variant's experts dense. Every other
use gets dense values: a module that does something else with its parameter is served slowly, not
wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from deltafold.runtime.kernels.experts import Stack
from deltafold.runtime.uses import tells_shape


class Lent(torch.Tensor):
    """The base's parameter, or some of its matrices, plus a delta.

    Attributes:
        plain: the base's values, in the order and orientation in which they are asked for.
        stack: the delta.
        scale: of the delta.
        expert: the matrix that was taken, or int64 `[k]`, one for each token; None for all.
        turned: whether `plain` holds the transposed matrices.
    """

    plain: torch.Tensor
    stack: Stack
    scale: float
    expert: int | torch.Tensor | None
    turned: bool

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Products and views keep the delta apart; whatever asks for values gets dense ones."""
        kwargs = kwargs or {}
        way = _WAYS.get(_name(func))
        found = None if way is None else way(func, args, kwargs)
        if found is not None:
            return found
        give = _plain if tells_shape(func) or _name(func) == "data_ptr" else _dense
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(give(a) for a in args), **{k: give(v) for k, v in kwargs.items()})


def lend(base: torch.Tensor, stack: Stack, scale: float) -> Lent:
    """The base's parameter `[E, A, B]` plus `scale` times a delta."""
    return _made(base.detach(), stack, scale, None, False)


def _made(
    plain: torch.Tensor,
    stack: Stack,
    scale: float,
    expert: int | torch.Tensor | None,
    turned: bool,
) -> Lent:
    with torch._C.DisableTorchFunctionSubclass():
        made = torch.Tensor._make_subclass(Lent, plain)
    made.plain, made.stack, made.scale = plain, stack, scale
    made.expert, made.turned = expert, turned
    return made


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    # An operator of torch.ops has its name with the overload behind it, or a packet's.
    return str(getattr(func, "_qualified_op_name", name)).rpartition("::")[2]


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, Lent) else value


def _dense(value: Any) -> Any:
    """Base plus delta, where a value is lent; anything else as it is."""
    if isinstance(value, tuple | list):
        return type(value)(_dense(v) for v in value)
    if not isinstance(value, Lent):
        return value
    device = value.plain.device
    if isinstance(value.expert, torch.Tensor):
        numbers, place = torch.unique(value.expert, return_inverse=True)
        each = [value.stack.dense(device, int(number)) for number in numbers]
        delta = torch.stack(each)[place]
    else:
        delta = value.stack.dense(device, value.expert)
    delta = delta.transpose(-1, -2) if value.turned else delta
    return (value.plain.to(torch.float32) + value.scale * delta).to(value.plain.dtype)


def _taken(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lent | None:
    """`parameter[e]` or `parameter[experts]`."""
    lent, index = args
    if not isinstance(lent, Lent) or lent.expert is not None or lent.turned:
        return None
    if isinstance(index, torch.Tensor) and index.dtype in (torch.int64, torch.int32):
        if index.dim() == 1:
            return _made(lent.plain[index], lent.stack, lent.scale, index.to(torch.int64), False)
        index = int(index) if index.dim() == 0 else None
    if type(index) is not int:
        return None
    number = index % lent.stack.shape[0]
    return _made(lent.plain[index], lent.stack, lent.scale, number, False)


def _over(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lent | None:
    """The matrices transposed."""
    lent, *dims = args
    if not isinstance(lent, Lent) or kwargs:
        return None
    if dims and {d % lent.plain.dim() for d in dims} != {
        lent.plain.dim() - 2,
        lent.plain.dim() - 1,
    }:
        return None
    if not dims and lent.plain.dim() != 2 and _name(func) != "mT":
        return None
    plain = lent.plain.transpose(-1, -2)
    return _made(plain, lent.stack, lent.scale, lent.expert, not lent.turned)


def _linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """`x W^T + b` with one matrix."""
    x, weight, *rest = args
    if not isinstance(weight, Lent) or type(weight.expert) is not int or isinstance(x, Lent):
        return None
    y = torch.nn.functional.linear(x, weight.plain, *rest, **kwargs)
    return _added(y, x, weight, turned=weight.turned)


def _matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """`x W` with one matrix."""
    x, weight = args
    if not isinstance(weight, Lent) or type(weight.expert) is not int or isinstance(x, Lent):
        return None
    return _added(x @ weight.plain, x, weight, turned=not weight.turned)


def _added(y: torch.Tensor, x: torch.Tensor, weight: Lent, *, turned: bool) -> torch.Tensor:
    assert type(weight.expert) is int
    flat = y.reshape(-1, y.shape[-1])
    weight.stack.add(
        flat, x.reshape(-1, x.shape[-1]), weight.expert, turned=turned, scale=weight.scale
    )
    return flat.reshape(y.shape)


def _grouped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """`x W_e` for tokens that are sorted by expert."""
    x, weight, *rest = args
    offsets = kwargs.get("offs", rest[0] if rest else None)
    if not isinstance(weight, Lent) or weight.expert is not None or offsets is None:
        return None
    if isinstance(x, Lent) or x.dim() != 2 or kwargs.get("bias") is not None:
        return None
    y: torch.Tensor = func(x, weight.plain, *rest, **kwargs)
    places = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
    experts = torch.searchsorted(offsets.contiguous(), places, right=True)
    weight.stack.add_by_expert(y, x, experts, turned=not weight.turned, scale=weight.scale)
    return y


def _batched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A matrix for each token: `[k, A, B]` times `[k, B, 1]`, or `[k, 1, A]` times `[k, A, B]`."""
    left, right = args
    weight, x = (left, right) if isinstance(left, Lent) else (right, left)
    if not isinstance(weight, Lent) or isinstance(x, Lent) or kwargs:
        return None
    if not isinstance(weight.expert, torch.Tensor) or x.shape[-1 if weight is left else 1] != 1:
        return None
    y = torch.bmm(_plain(left), _plain(right))
    flat = y.reshape(len(y), -1)
    turned = weight.turned if weight is left else not weight.turned
    weight.stack.add_by_expert(
        flat, x.reshape(len(x), -1), weight.expert, turned=turned, scale=weight.scale
    )
    return flat.reshape(y.shape)


_WAYS: Final[dict[str, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]]] = {
    "__getitem__": _taken,
    "transpose": _over,
    "mT": _over,
    "T": _over,
    "t": _over,
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _batched,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}
