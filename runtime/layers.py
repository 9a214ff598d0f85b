"""What happens inside a wrapped module: the base's own output, plus each variant's delta on its rows.

A module is wrapped by giving its instance another `forward`; the module itself, its class and its
weight stay as they are, so that models that look at them see no difference. The base's forward runs
on all rows first, and its result for rows of the base is not touched again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltafold.compress import DeltafoldError
from deltafold.runtime.batch import BatchState

Forward = Callable[..., Any]


class LinearHook:
    """`y = x W^T + b`, then `y[rows] += s * (x[rows] D^T + d)`, one product a variant."""

    def __init__(self, name: str, module: nn.Linear, state: BatchState) -> None:
        self._name, self._state = name, state
        self._original: Forward = module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[B, ..., M]` to `[B, ..., N]`."""
        y: torch.Tensor = self._original(x)
        if self._state.groups:
            rows, each = self._state.rows_in(x.shape[0], self._name)
            xs = x.index_select(0, rows)
            flat = xs.reshape(-1, x.shape[-1])
            added = torch.cat(self._products(flat, y.shape[-1]))
            added = added.reshape(*xs.shape[:-1], y.shape[-1])
            if self._state.scales is not None:
                added = added * self._state.spread_scales(each, added)
            y.index_add_(0, rows, added.to(y.dtype))
        return y

    def _products(self, flat: torch.Tensor, columns: int) -> list[torch.Tensor]:
        """The delta's part of each group's tokens, in the groups' order."""
        tokens = len(flat) // len(self._state.rows)
        products, start = [], 0
        for group in self._state.groups:
            stop = start + group.size * tokens
            matrix = group.variant.products.get(self._name)
            bias = group.variant.vectors.get(f"{self._name}.bias")
            if matrix is not None:
                part = matrix.matmul(flat[start:stop])
            else:
                part = flat.new_zeros(stop - start, columns)
            products.append(part if bias is None else part + bias.to(part.dtype))
            start = stop
        return products


class EmbeddingHook:
    """`y = W[ids]`, then `y[rows] += s * D[ids[rows]]`."""

    def __init__(self, name: str, module: nn.Embedding, state: BatchState) -> None:
        self._name, self._state = name, state
        self._original: Forward = module.forward

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 ids `[B, T]` to `[B, T, M]`."""
        y: torch.Tensor = self._original(ids)
        if self._state.groups:
            rows, each = self._state.rows_in(ids.shape[0], self._name)
            chosen = ids.index_select(0, rows)
            added = torch.cat(self._looked_up(chosen.reshape(-1), y)).reshape(
                *chosen.shape, y.shape[-1]
            )
            if self._state.scales is not None:
                added = added * self._state.spread_scales(each, added)
            y.index_add_(0, rows, added)
        return y

    def _looked_up(self, ids: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        tokens = len(ids) // len(self._state.rows)
        found, start = [], 0
        for group in self._state.groups:
            stop = start + group.size * tokens
            table = group.variant.tables.get(self._name)
            if table is not None:
                found.append(table.gather(ids[start:stop]).to(y.dtype))
            else:
                found.append(y.new_zeros(stop - start, y.shape[-1]))
            start = stop
        return found


class SubstituteHook:
    """Any other module: the variants' rows go through the module once more, with their parameters.

    Right for whatever the module computes, as long as rows do not mix in it; meant for small ones
    (norms, convolutions, scaled embeddings). Where torch can map the module over its parameters, all
    variants go through in one call; otherwise one call a variant.
    """

    def __init__(self, name: str, module: nn.Module, state: BatchState) -> None:
        self._name, self._module, self._state = name, module, state
        self._original: Forward = module.forward
        self._again = False
        self._can_map = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own signature; tensors with the batch in front are cut to a variant's rows."""
        y = self._original(*args, **kwargs)
        if self._again or not any(g.variant.vectors_of(self._name) for g in self._state.groups):
            return y
        if not isinstance(y, torch.Tensor):
            raise DeltafoldError(
                "engine-unsupported",
                f"{self._name} returns {type(y).__name__}, not one tensor.",
                fix="restore this variant and serve it by itself",
            )
        rows, each = self._state.rows_in(y.shape[0], self._name)
        calls = _Calls(args, kwargs, y.shape[0])
        self._again = True
        try:
            again = self._mapped(calls, rows, each) if self._maps(calls) else None
            y.index_copy_(0, rows, self._one_by_one(calls, rows, each) if again is None else again)
        finally:
            self._again = False
        return y

    def _maps(self, calls: _Calls) -> bool:
        return self._can_map and len(self._state.groups) > 2 and calls.simple

    def _mapped(self, calls: _Calls, rows: torch.Tensor, each: int) -> torch.Tensor | None:
        """All rows in one call, each with parameters of its own; None where torch cannot."""
        own = self._row_parameters(each)

        def one(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
            # Modules expect the batch dimension that the mapping took away.
            return torch.func.functional_call(self._module, parameters, (x.unsqueeze(0),))[0]

        try:
            out = torch.vmap(one)(own, calls.args[0].index_select(0, rows))
        except (RuntimeError, NotImplementedError, ValueError):
            self._can_map = False
            return None
        assert isinstance(out, torch.Tensor)
        return out

    def _row_parameters(self, each: int) -> dict[str, torch.Tensor]:
        changed = {a for g in self._state.groups for a in g.variant.vectors_of(self._name)}
        own = {}
        for attribute in changed:
            value = getattr(self._module, attribute)
            zero = torch.zeros_like(value, dtype=torch.float32)
            stacked = torch.stack(
                [g.variant.vectors_of(self._name).get(attribute, zero) for g in self._state.groups]
            )
            sizes = torch.tensor([g.size for g in self._state.groups], device=value.device)
            deltas = stacked.repeat_interleave(sizes * each, dim=0)
            if self._state.scales is not None:
                deltas = deltas * self._state.spread_scales(each, deltas)
            own[attribute] = (value.to(torch.float32) + deltas).to(value.dtype)
        return own

    def _one_by_one(self, calls: _Calls, rows: torch.Tensor, each: int) -> torch.Tensor:
        scales = [1.0] * len(self._state.rows)
        if self._state.scales is not None:
            scales = self._state.scales.tolist()
        outs, start = [], 0
        for group in self._state.groups:
            deltas = group.variant.vectors_of(self._name)
            # Rows of one variant may have different scales; equal neighbours go together.
            stop = start + group.size
            while start < stop:
                end = next((i for i in range(start, stop) if scales[i] != scales[start]), stop)
                chunk = rows[start * each : end * each]
                outs.append(self._rerun(calls, chunk, deltas, scales[start]))
                start = end
        return torch.cat(outs)

    def _rerun(
        self, calls: _Calls, rows: torch.Tensor, deltas: dict[str, torch.Tensor], scale: float
    ) -> torch.Tensor:
        own: dict[str, torch.Tensor] = {}
        for attribute, delta in deltas.items():
            value = getattr(self._module, attribute)
            own[attribute] = (value.to(torch.float32) + scale * delta).to(value.dtype)
        args, kwargs = calls.cut(rows)
        out = torch.func.functional_call(self._module, own, args, kwargs)
        assert isinstance(out, torch.Tensor)
        return out


@dataclass(frozen=True)
class _Calls:
    """The arguments of one call; `leading` is the size of the batch dimension."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leading: int

    @property
    def simple(self) -> bool:
        """One tensor with the batch in front, nothing else."""
        return len(self.args) == 1 and not self.kwargs and self._has_batch(self.args[0])

    def cut(self, rows: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for some rows alone."""

        def pick(value: Any) -> Any:
            return value.index_select(0, rows) if self._has_batch(value) else value

        return tuple(pick(a) for a in self.args), {k: pick(v) for k, v in self.kwargs.items()}

    def _has_batch(self, value: Any) -> bool:
        whole = isinstance(value, torch.Tensor) and value.dim() > 0
        return bool(whole and value.shape[0] == self.leading)


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
