"""The operators that vLLM's compiled graphs see, and the wrappers that call them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, cast

import torch
from torch import nn

from deltafold.runtime.vllm.experts import ExpertsHook
from deltafold.runtime.vllm.hooks import HOOKS, LayerHook, NormHook, register

#: Name of the small tensor by which a layer tells the operators which hook is its own.
HANDLE = "deltafold_handle"


def _add(y: torch.Tensor, x: torch.Tensor, handle: torch.Tensor, biased: bool) -> None:
    HOOKS[int(handle)].add_products(y, x, biased)


def _lookup(y: torch.Tensor, ids: torch.Tensor, handle: torch.Tensor) -> None:
    HOOKS[int(handle)].add_rows(y, ids)


def _renorm(y: torch.Tensor, x: torch.Tensor, handle: torch.Tensor) -> None:
    HOOKS[int(handle)].renorm(y, x)


def _experts(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    handle: torch.Tensor,
) -> None:
    HOOKS[int(handle)].rerun(y, x, weights, ids)


def _nothing_biased(y: torch.Tensor, x: torch.Tensor, handle: torch.Tensor, biased: bool) -> None:
    return None


def _nothing_plain(y: torch.Tensor, x: torch.Tensor, handle: torch.Tensor) -> None:
    return None


def _nothing_ids(y: torch.Tensor, ids: torch.Tensor, handle: torch.Tensor) -> None:
    return None


def _nothing_routed(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    handle: torch.Tensor,
) -> None:
    return None


@cache
def operators() -> Any:
    """`torch.ops.deltafold`, defined on first use."""
    make: Any = torch.library.Library  # torch gives it no types
    library = make("deltafold", "DEF")
    library.define("add(Tensor(a!) y, Tensor x, Tensor handle, bool biased) -> ()")
    library.define("lookup(Tensor(a!) y, Tensor ids, Tensor handle) -> ()")
    library.define("renorm(Tensor(a!) y, Tensor x, Tensor handle) -> ()")
    library.define(
        "experts(Tensor(a!) y, Tensor x, Tensor weights, Tensor ids, Tensor handle) -> ()"
    )
    for name, run, fake in (
        ("add", _add, _nothing_biased),
        ("lookup", _lookup, _nothing_ids),
        ("renorm", _renorm, _nothing_plain),
        ("experts", _experts, _nothing_routed),
    ):
        library.impl(name, run, "CPU")
        library.impl(name, run, "CUDA")
        torch.library.register_fake(f"deltafold::{name}", fake, lib=library)
    _LIBRARIES.append(library)
    return torch.ops.deltafold


#: An operator lives as long as the library object that defined it.
_LIBRARIES: Final[list[Any]] = []


class DeltaMethod:
    """Stands in for a layer's `quant_method`: the base's result, plus the deltas."""

    def __init__(self, inner: Any, hook: LayerHook) -> None:
        self.inner, self._hook = inner, hook
        self._ops = operators()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x W^T + b` with each row's own W and b."""
        y: torch.Tensor = self.inner.apply(layer, x, bias)
        if not torch.compiler.is_compiling() and self._hook.rests(x):
            return y  # an operator's call alone is felt where layers are small
        self._ops.add(y, x, layer.deltafold_handle, bias is not None)
        return y

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows of each token's own table."""
        y: torch.Tensor = self.inner.embedding(layer, ids)
        if torch.compiler.is_compiling() or not self._hook.rests_at_lookup(ids):
            self._ops.lookup(y, ids, layer.deltafold_handle)
        return y


def wrap_experts(layer: nn.Module, hook: ExpertsHook) -> None:
    """Give the `quant_method` of experts, which is a module itself, an `apply` that ends in a hook."""
    layer.register_buffer(HANDLE, register(hook), persistent=False)
    method: Any = layer.quant_method
    plain, ops = method.apply, operators()

    def apply(
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **named: Any,
    ) -> torch.Tensor:
        y: torch.Tensor = plain(layer, x, topk_weights, topk_ids, *args, **named)
        ops.experts(y, x, topk_weights, topk_ids, layer.deltafold_handle)
        return y

    method.apply = apply


def wrap_layer(layer: nn.Module, hook: LayerHook) -> None:
    """Put a hook behind a layer's `quant_method`."""
    layer.register_buffer(HANDLE, register(hook), persistent=False)
    wrapped = cast(Any, layer)
    wrapped.quant_method = DeltaMethod(wrapped.quant_method, hook)
    # No fusion may quantise what goes in: the delta needs it whole.
    wrapped.requires_unquantized_input = True
    # With several ranks on CUDA, the fused lookup would read the table itself.
    if getattr(layer, "use_fused_embedding", False):
        wrapped.use_fused_embedding = False
    # A router's gate has kernels of its own that read the weight themselves.
    for name in [n for n in vars(layer) if n.startswith("allow_") and n.endswith("_gemm")]:
        setattr(layer, name, False)


def wrap_norm(norm: nn.Module, hook: NormHook) -> None:
    """Give a norm's instance a `forward` that norms the variants' rows once more."""
    norm.register_buffer(HANDLE, register(hook), persistent=False)
    plain: Callable[..., Any] = norm.forward
    ops = operators()

    def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            y = plain(x)
            if torch.compiler.is_compiling() or not hook.rests(x):
                ops.renorm(y, x, norm.deltafold_handle)
            return y
        y, total = plain(x, residual)
        if torch.compiler.is_compiling() or not hook.rests(total):
            ops.renorm(y, total, norm.deltafold_handle)
        return y, total

    norm.forward = forward
