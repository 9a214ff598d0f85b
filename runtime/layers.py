"""What happens inside a wrapped module: the base's own output, plus each variant's delta on its rows.

A module is wrapped by giving its instance another `forward`; the module itself, its class and its
weight stay as they are, so that models that look at them see no difference. The base's forward runs
on all rows first, and its result for rows of the base is not touched again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deltafold.compress import DeltafoldError
from deltafold.runtime.batch import BatchState, Group

Forward = Callable[..., Any]


class LinearHook:
    """`y = x W^T + b`, then `y[rows] += s * (x[rows] D^T + d)`."""

    def __init__(self, name: str, module: nn.Linear, state: BatchState) -> None:
        self._name, self._state = name, state
        self._original: Forward = module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[B, ..., M]` to `[B, ..., N]`."""
        y: torch.Tensor = self._original(x)
        for group in self._state.groups:
            self._add(x, y, group)
        return y

    def _add(self, x: torch.Tensor, y: torch.Tensor, group: Group) -> None:
        matrix = group.variant.products.get(self._name)
        bias = group.variant.vectors.get(f"{self._name}.bias")
        if matrix is None and bias is None:
            return
        rows, each = self._state.rows_of(group, x.shape[0], self._name)
        everything = len(rows) == x.shape[0]
        xs = x if everything else x.index_select(0, rows)
        flat = xs.reshape(-1, x.shape[-1])
        added = torch.zeros((), dtype=y.dtype, device=y.device).expand(len(flat), y.shape[-1])
        if matrix is not None:
            added = matrix.matmul(flat)
        if bias is not None:
            added = added + bias.to(added.dtype)
        added = added.reshape(*xs.shape[:-1], y.shape[-1])
        if group.scales is not None:
            added = added * _spread(group.scales, each, added)
        if everything:
            y += added
        else:
            y.index_add_(0, rows, added.to(y.dtype))


class EmbeddingHook:
    """`y = W[ids]`, then `y[rows] += s * D[ids[rows]]`."""

    def __init__(self, name: str, module: nn.Embedding, state: BatchState) -> None:
        self._name, self._state = name, state
        self._original: Forward = module.forward

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 ids `[B, T]` to `[B, T, M]`."""
        y: torch.Tensor = self._original(ids)
        for group in self._state.groups:
            table = group.variant.tables.get(self._name)
            if table is None:
                continue
            rows, each = self._state.rows_of(group, ids.shape[0], self._name)
            chosen = ids.index_select(0, rows)
            added = table.gather(chosen.reshape(-1)).reshape(*chosen.shape, y.shape[-1])
            if group.scales is not None:
                added = added * _spread(group.scales, each, added)
            y.index_add_(0, rows, added.to(y.dtype))
        return y


class SubstituteHook:
    """Any other module: the variant's rows go through the module once more, with its parameters.

    Right for whatever the module computes, as long as rows do not mix in it; meant for small ones
    (norms, convolutions, scaled embeddings).
    """

    def __init__(self, name: str, module: nn.Module, state: BatchState) -> None:
        self._name, self._module, self._state = name, module, state
        self._original: Forward = module.forward
        self._again = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own signature; tensors with the batch in front are cut to a variant's rows."""
        y = self._original(*args, **kwargs)
        if self._again or not self._state.groups:
            return y
        if not isinstance(y, torch.Tensor):
            raise DeltafoldError(
                "engine-unsupported",
                f"{self._name} returns {type(y).__name__}, not one tensor.",
                fix="restore this variant and serve it by itself",
            )
        leading = y.shape[0]
        for group in self._state.groups:
            deltas = group.variant.vectors_of(self._name)
            if not deltas:
                continue
            rows, each = self._state.rows_of(group, leading, self._name)
            for chunk, scale in _by_scale(rows, group.scales, each):
                y.index_copy_(0, chunk, self._rerun(chunk, leading, deltas, scale, args, kwargs))
        return y

    def _rerun(
        self,
        rows: torch.Tensor,
        leading: int,
        deltas: dict[str, torch.Tensor],
        scale: float,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        own: dict[str, torch.Tensor] = {}
        for attribute, delta in deltas.items():
            value = getattr(self._module, attribute)
            own[attribute] = (value.to(torch.float32) + scale * delta).to(value.dtype)

        def pick(value: Any) -> Any:
            whole = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == leading
            return value.index_select(0, rows) if whole else value

        self._again = True
        try:
            out = torch.func.functional_call(
                self._module,
                own,
                tuple(pick(a) for a in args),
                {k: pick(v) for k, v in kwargs.items()},
            )
        finally:
            self._again = False
        assert isinstance(out, torch.Tensor)
        return out


def wrap(name: str, module: nn.Module, state: BatchState) -> None:
    """Give a module's instance the hook for its kind."""
    hook: Forward
    if is_linear(module):
        assert isinstance(module, nn.Linear)
        hook = LinearHook(name, module, state)
    elif is_embedding(module):
        assert isinstance(module, nn.Embedding)
        hook = EmbeddingHook(name, module, state)
    else:
        hook = SubstituteHook(name, module, state)
    module.forward = hook


def unwrap(module: nn.Module) -> None:
    """Undo `wrap`: the class's own forward shows again."""
    module.__dict__.pop("forward", None)


def is_linear(module: nn.Module) -> bool:
    """A linear layer that computes just what `nn.Linear` does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_embedding(module: nn.Module) -> bool:
    """An embedding that computes just what `nn.Embedding` does."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
    )


def _spread(scales: torch.Tensor, each: int, like: torch.Tensor) -> torch.Tensor:
    repeated = scales.repeat_interleave(each) if each > 1 else scales
    return repeated.reshape(-1, *[1] * (like.dim() - 1)).to(like.dtype)


def _by_scale(
    rows: torch.Tensor, scales: torch.Tensor | None, each: int
) -> list[tuple[torch.Tensor, float]]:
    if scales is None:
        return [(rows, 1.0)]
    repeated = scales.repeat_interleave(each)
    return [(rows[repeated == s], float(s)) for s in torch.unique(scales)]
