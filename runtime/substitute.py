"""The hook for every module that is not a product or a table: run it again with other parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltafold.compress import DeltafoldError
from deltafold.runtime.batch import BatchState, Group
from deltafold.runtime.layers import Forward
from deltafold.runtime.layout import Layout, Tree
from deltafold.runtime.lent import lend
from deltafold.runtime.replay import Recorder, Replay, recorded

#: Parameters above this size are not copied for every row; each variant is called by itself.
_MAPPED_BELOW = 2**16


class SubstituteHook:
    """The variants' rows go through the module once more, with their parameters.

    Right for whatever the module computes, as long as rows do not mix in it. Parameters may belong to
    modules inside, which are then read by this one. Small modules that torch can map over their
    parameters go through in one call for all variants; otherwise there is one call a variant.
    """

    def __init__(self, name: str, module: nn.Module, state: BatchState, layout: Layout) -> None:
        self._name, self._module, self._state, self._layout = name, module, state, layout
        self._original: Forward = module.forward
        self._again = False
        self._can_map = not any(True for _ in module.children())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own signature; tensors with the batch in front are cut to a variant's rows."""
        groups = self._state.groups
        if self._again or not any(g.variant.changes(self._name) for g in groups):
            return self._original(*args, **kwargs)
        args, kwargs = recorded(args, kwargs)
        y = self._original(*args, **kwargs)
        call = _Call(self._name, self._state, self._layout, args, kwargs, self._state.size)
        self._again = True
        self._state.report(self._name)
        try:
            again = self._mapped(call) if self._maps(call, y) else None
            return self._one_by_one(call, y) if again is None else call.merge(y, again, None)
        finally:
            self._again = False

    def _maps(self, call: _Call, y: Any) -> bool:
        if any(g.variant.stacks.get(self._name) for g in self._state.groups):
            return False
        small = all(
            v.numel() <= _MAPPED_BELOW
            for g in self._state.groups
            for v in g.variant.vectors_of(self._name).values()
        )
        return self._can_map and small and len(self._state.groups) > 2 and call.simple(y)

    def _mapped(self, call: _Call) -> torch.Tensor | None:
        """All rows in one call, each with parameters of its own; None where torch cannot."""
        rows, each = self._state.rows_in(call.args[0].shape[0], self._name)
        own = self._row_parameters(each)

        def one(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
            # Modules expect the batch dimension that the mapping took away.
            return torch.func.functional_call(self._module, parameters, (x.unsqueeze(0),))[0]

        try:
            out = torch.vmap(one)(own, call.args[0].index_select(0, rows))
        except (RuntimeError, NotImplementedError, ValueError):
            self._can_map = False
            return None
        assert isinstance(out, torch.Tensor)
        return out

    def _row_parameters(self, each: int) -> dict[str, torch.Tensor]:
        changed = {a for g in self._state.groups for a in g.variant.vectors_of(self._name)}
        own = {}
        for attribute in changed:
            value = _value(self._module, attribute)
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

    def _one_by_one(self, call: _Call, y: Any) -> Any:
        scales = [1.0] * len(self._state.rows)
        if self._state.scales is not None:
            scales = self._state.scales.tolist()
        rows, start = self._state.rows, 0
        for group in self._state.groups:
            stop = start + group.size
            # Rows of one variant may have different scales; equal neighbours go together.
            while start < stop:
                end = next((i for i in range(start, stop) if scales[i] != scales[start]), stop)
                if group.variant.changes(self._name):
                    again = self._rerun(call, rows[start:end], group, scales[start])
                    y = call.merge(y, again, rows[start:end])
                start = end
        return y

    def _rerun(self, call: _Call, rows: torch.Tensor, group: Group, scale: float) -> Any:
        own: dict[str, torch.Tensor] = {}
        for attribute, delta in group.variant.vectors_of(self._name).items():
            value = _value(self._module, attribute)
            if delta.is_meta:
                # The warm-up's variant, which differs by nothing and holds no memory.
                own[attribute] = value
                continue
            own[attribute] = (value.to(torch.float32) + scale * delta).to(value.dtype)
        for attribute, stack in group.variant.stacks.get(self._name, {}).items():
            value = own.get(attribute, _value(self._module, attribute))
            own[attribute] = lend(value, stack, scale)
        args, kwargs = call.cut(rows)
        # Modules inside that are wrapped too now see these rows alone.
        with self._state.narrowed(group.variant, scale, len(rows)):
            return torch.func.functional_call(self._module, own, args, kwargs)


def _value(module: nn.Module, path: str) -> torch.Tensor:
    *inner, attribute = path.split(".")
    value = getattr(module.get_submodule(".".join(inner)), attribute)
    assert isinstance(value, torch.Tensor)
    return value


@dataclass(frozen=True)
class _Call:
    """One call of a module, cut and put together along its requests."""

    name: str
    state: BatchState
    layout: Layout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: Requests of the whole batch; the state's own number is smaller while the module runs again.
    size: int

    def simple(self, y: Any) -> bool:
        """One tensor in, one out, both with requests or tokens in front."""
        if len(self.args) != 1 or self.kwargs or not isinstance(y, torch.Tensor):
            return False
        first, kinds = self.args[0], (self.layout.args[0], self.layout.output)
        return (
            isinstance(first, torch.Tensor)
            and kinds in (("rows", "rows"), ("tokens", "tokens"))
            and first.shape[0] == y.shape[0]
            and y.shape[0] % self.size == 0
        )

    def cut(self, rows: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for some requests alone."""
        kinds = [*self.layout.args, *[None] * len(self.args)]
        args = tuple(self._pick(a, k, rows) for a, k in zip(self.args, kinds, strict=False))
        named = {k: self._pick(v, self.layout.kwarg(k), rows) for k, v in self.kwargs.items()}
        return args, named

    def merge(self, y: Any, again: Any, rows: torch.Tensor | None, kind: Tree | None = None) -> Any:
        """`y` with some requests' rows replaced; None means those of all variants."""
        kind = self.layout.output if kind is None else kind
        if isinstance(y, tuple | list):
            kinds = kind if isinstance(kind, tuple) else (kind,) * len(y)
            parts = [self.merge(a, b, rows, k) for a, b, k in zip(y, again, kinds, strict=True)]
            return type(y)(*parts) if hasattr(y, "_fields") else type(y)(parts)
        if isinstance(y, Mapping):
            parts = self.merge(list(y.values()), list(again.values()), rows, kind)
            return type(y)(**dict(zip(y, parts, strict=True)))
        if not isinstance(y, torch.Tensor) or kind == "whole":
            return y
        y = self.state.for_each_row(y)
        where = self._spread(self.state.rows if rows is None else rows, y)
        if again.shape[0] == 1 != len(where):
            again = again.expand(len(where), *again.shape[1:])
        # A clone keeps the order in memory, on which the bits of later products may depend.
        return y.clone().index_copy_(0, where, again.to(y.dtype))

    def _pick(self, value: Any, kind: Tree | None, rows: torch.Tensor) -> Any:
        if isinstance(value, tuple | list):
            kinds = kind if isinstance(kind, tuple) else (None,) * len(value)
            parts = [self._pick(v, k, rows) for v, k in zip(value, kinds, strict=False)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, Mapping):
            parts = self._pick(list(value.values()), kind, rows)
            return type(value)(**dict(zip(value, parts, strict=True)))
        if isinstance(value, torch.Tensor):
            return self._pick_tensor(value, kind, rows)
        if value is None or isinstance(value, bool | int | float | str | torch.dtype):
            return value
        if isinstance(value, Recorder):
            return Replay(value, lambda answer: self._pick_tensor(answer, "rows", rows))
        raise self._unsupported(f"is given a {type(value).__name__}")

    def _pick_tensor(
        self, value: torch.Tensor, kind: Tree | None, rows: torch.Tensor
    ) -> torch.Tensor:
        if not value.dim() or kind == "other" or value.shape[0] == 1:
            # A single row stands for every request, or is the only request.
            return value
        if kind in ("rows", "one", "whole", None):
            if value.shape[0] == self.size:
                return value.index_select(0, rows)
            raise self._unsupported(f"is given {list(value.shape)} for {self.size} requests")
        return value.index_select(0, self._spread(rows, value))

    def _spread(self, rows: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Requests as places in the first dimension of `value`."""
        each, rest = divmod(value.shape[0], self.size)
        if rest or not each:
            raise self._unsupported(f"returns {list(value.shape)} for {self.size} requests")
        if each == 1:
            return rows
        within = torch.arange(each, device=rows.device)
        return (rows.unsqueeze(1) * each + within).reshape(-1)

    def _unsupported(self, what: str) -> DeltafoldError:
        return DeltafoldError(
            "engine-unsupported",
            f"{self.name} {what}, so requests cannot be told apart in it.",
            fix="restore this variant and serve it by itself",
        )
