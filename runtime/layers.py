"""What happens inside a wrapped module: the base's own output, plus each variant's delta on its rows.

A module is wrapped by giving its instance another `forward`; the module itself, its class and its
weight stay as they are, so that models that look at them see no difference. The base's forward runs
on all rows first, and its result for rows of the base is not touched again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels.base import DeltaMatrix
from deltafold.runtime.layout import Layout
from deltafold.runtime.packed import PackedLayers, PackedRows
from deltafold.runtime.prefill import MergedLayer
from deltafold.runtime.quantized import QuantizedLinear
from deltafold.runtime.siblings import Siblings

Forward = Callable[..., Any]


class LinearHook:
    """`y = x W^T + b`, then `y[rows] += s * (x[rows] D^T + d)`, one product a variant.

    Attributes:
        base: the module's own forward.
    """

    def __init__(
        self, name: str, module: nn.Module, state: BatchState, siblings: Siblings | None = None
    ) -> None:
        self._name, self._state, self._siblings = name, state, siblings
        self._module = module
        self.base: Forward = module.forward
        self._packed = PackedLayers([name], state)
        self._merged = MergedLayer(name, module, state)
        if siblings is not None:
            siblings.join(name, self)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[B, ..., M]` to `[B, ..., N]`.

        Variants with a larger vocabulary widen the output of the head: rows of others get minus
        infinity there, and rows of variants with a smaller one where theirs ends.
        """
        if self._state.groups:
            ready = self._merged.output(x)
            if ready is None and self._siblings is not None and self._state.packed:
                ready = self._siblings.output(self._name, x)
            if ready is not None:
                self._state.report(self._name)
                return ready
        y: torch.Tensor = self.base(x)
        if self._state.groups:
            x, y = self._state.for_each_row(x), self._state.for_each_row(y)
            rows, each = self._state.rows_in(x.shape[0], self._name)
            self._state.report(self._name)
            if self._state.packed:
                return self._packed.add(x, [y], rows, each)[0]
            xs = x.index_select(0, rows)
            flat = xs.reshape(-1, x.shape[-1])
            products = self._products(flat, y.shape[-1])
            if any(p.shape[-1] != y.shape[-1] for p in products):
                y, products = _same_width(y, products, rows)
            added = torch.cat(products).reshape(*xs.shape[:-1], y.shape[-1])
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
            bias = group.variant.vectors_of(self._name).get("bias")
            if matrix is not None:
                part = matrix.matmul(flat[start:stop])
            else:
                part = flat.new_zeros(stop - start, columns)
            products.append(part if bias is None else part + bias.to(part.dtype))
            start = stop
        return products


def _same_width(
    y: torch.Tensor, products: list[torch.Tensor], rows: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and products as wide as the widest variant's vocabulary."""
    base = y.shape[-1]
    width = max(base, *(p.shape[-1] for p in products))
    pad = nn.functional.pad
    wide = pad(y, (0, width - base), value=float("-inf"))
    # What a variant adds beyond the base's columns is its whole value there.
    columns = torch.arange(width, device=y.device) >= base
    wide[rows] = wide[rows].masked_fill(columns, 0)
    return wide, [pad(p, (0, width - p.shape[-1]), value=float("-inf")) for p in products]


class EmbeddingHook:
    """`y = W[ids]`, then `y[rows] += s * D[ids[rows]]`.

    Classes that do more with a row than look it up (scale it, say) are asked once more with a small
    table of the rows that are in use.
    """

    def __init__(self, name: str, module: nn.Embedding, state: BatchState) -> None:
        self._name, self._module, self._state = name, module, state
        self._original: Forward = module.forward
        self._plain = type(module).forward is nn.Embedding.forward
        self._again = False
        self._packed = PackedRows(name, state)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 ids `[B, T]` to `[B, T, M]`."""
        if self._again or not any(self._name in g.variant.tables for g in self._state.groups):
            y: torch.Tensor = self._original(ids)
            return y
        known = self._module.num_embeddings
        # Ids beyond the base's rows belong to variants that added them.
        y = self._state.for_each_row(self._original(ids.clamp_max(known - 1)))
        ids = self._state.for_each_row(ids)
        rows, each = self._state.rows_in(ids.shape[0], self._name)
        self._state.report(self._name)
        done = set[int]()
        if self._plain:
            y = y.masked_fill_((ids >= known).unsqueeze(-1), 0)
            if self._state.packed and y.is_contiguous():
                done = self._packed.add(y, ids)
        found = self._looked_up(ids, rows, each, done, y)
        if not found:
            return y
        rows = torch.cat([some for some, _ in found])
        added = torch.cat([part for _, part in found])
        if self._plain:
            return y.index_add_(0, rows, added)
        chosen = ids.index_select(0, rows)
        return y.index_copy_(0, rows, self._through_module(chosen, added).to(y.dtype))

    def _looked_up(
        self, ids: torch.Tensor, rows: torch.Tensor, each: int, done: set[int], y: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Rows of each group that has a table and is not `done`, and what is added to them."""
        found, start = [], 0
        for group in self._state.groups:
            stop = start + group.size * each
            table = group.variant.tables.get(self._name)
            if table is not None and group.slot not in done:
                some = rows[start:stop]
                chosen = ids.index_select(0, some)
                size = group.variant.sizes.get(self._name)
                added = _gather(table, chosen.reshape(-1), size).to(y.dtype)
                added = added.reshape(*chosen.shape, y.shape[-1])
                if self._state.scales is not None:
                    scales = self._state.scales.repeat_interleave(each)[start:stop]
                    added = added * scales.reshape(-1, *[1] * chosen.dim()).to(added.dtype)
                found.append((some, added))
            start = stop
        return found

    def _through_module(self, ids: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """The module's own forward over a table that holds each token's row by itself."""
        known = self._module.num_embeddings
        weight = self._module.weight.detach()
        table = weight[ids.clamp_max(known - 1)].masked_fill((ids >= known).unsqueeze(-1), 0)
        table = (table + added).reshape(-1, weight.shape[-1]).to(weight.dtype)
        places = torch.arange(len(table), device=ids.device).reshape(ids.shape)
        # It counts rows of the whole table, and says something to training alone.
        padding, self._module.padding_idx = self._module.padding_idx, None
        self._again = True
        try:
            out = torch.func.functional_call(self._module, {"weight": table}, (places,))
        finally:
            self._again = False
            self._module.padding_idx = padding
        assert isinstance(out, torch.Tensor)
        return out


def _gather(table: DeltaMatrix, ids: torch.Tensor, rows: int | None) -> torch.Tensor:
    """Rows of D; ids that a smaller vocabulary lacks stand for padding alone."""
    return table.gather(ids if rows is None else ids.clamp_max(rows - 1))


def wrap(
    name: str,
    module: nn.Module,
    state: BatchState,
    layout: Layout,
    siblings: Siblings | None = None,
) -> None:
    """Give a module's instance the hook for its kind; linear layers may have siblings."""
    from deltafold.runtime.substitute import SubstituteHook

    hook: Forward
    before = module.__dict__.get("forward")
    if is_linear(module) or is_transposed_linear(module):
        hook = LinearHook(name, module, state, siblings)
    elif is_embedding(module):
        assert isinstance(module, nn.Embedding)
        hook = EmbeddingHook(name, module, state)
    else:
        hook = SubstituteHook(name, module, state, layout)
    module.forward = hook
    # Kept beside the hook for `unwrap`: what the instance had of its own, or None.
    module.__dict__["_deltafold_before"] = before


def unwrap(module: nn.Module) -> None:
    """Undo `wrap`: the forward that was there before shows again."""
    module.__dict__.pop("forward", None)
    before = module.__dict__.pop("_deltafold_before", None)
    if before is not None:
        module.forward = before


def is_linear(module: nn.Module) -> bool:
    """A linear layer that computes just what `nn.Linear` does, in its own words perhaps."""
    if isinstance(module, QuantizedLinear):
        return not module.transposed
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or _is_product(module)


@torch.no_grad()
def _is_product(module: nn.Linear) -> bool:
    """Whether a class's own forward is the plain product, tried on a few rows."""
    weight = module.weight
    if not weight.is_floating_point() or weight.shape != (module.out_features, module.in_features):
        return False
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, module.in_features, generator=noise).to(weight.device, weight.dtype)
    plain = nn.functional.linear(x, weight, module.bias)
    try:
        found = type(module).forward(module, x)
    except (RuntimeError, TypeError, AttributeError):
        return False
    limit = 1e-4 if weight.dtype == torch.float32 else 2e-2
    same = isinstance(found, torch.Tensor) and found.shape == plain.shape
    return same and torch.allclose(found, plain, rtol=limit, atol=limit * float(plain.abs().max()))


def is_transposed_linear(module: nn.Module) -> bool:
    """A linear layer that keeps its weight as `[in, out]` and computes `x W + b`."""
    if isinstance(module, QuantizedLinear):
        return module.transposed
    weight = getattr(module, "weight", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, torch.Tensor):
        return False
    return weight.dim() == 2 and set(module._parameters) == {"weight", "bias"}


def is_embedding(module: nn.Module) -> bool:
    """An embedding that looks rows up, perhaps changing each by itself (see `EmbeddingHook`)."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return type(module).forward is nn.Embedding.forward or _looks_up_alone(module)


@torch.no_grad()
def _looks_up_alone(module: nn.Embedding) -> bool:
    """Whether a class's own forward depends on the looked-up rows alone, tried on a few ids."""
    ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device).flip(0)[None]
    table = module.weight[ids[0]]
    places = torch.arange(len(table), device=table.device)[None]
    forward = type(module).forward
    # A copy, since the module itself may be running on another thread.
    small_module = copy.copy(module)
    small_module._parameters = {"weight": nn.Parameter(table, requires_grad=False)}
    small_module.padding_idx = None
    try:
        plain, small = forward(module, ids), forward(small_module, places)
    except (RuntimeError, TypeError, IndexError, AttributeError):
        return False
    return isinstance(plain, torch.Tensor) and torch.equal(plain, small)
