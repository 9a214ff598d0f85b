"""Linear layers' deltas on a GPU: those in packed forms by one launch for all variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels.base import DeltaMatrix

if TYPE_CHECKING:
    from deltafold.runtime.kernels.triton.grouped import GroupedProducts

#: Rows of an output, and what is added to them.
_Added: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]


class PackedLayers:
    """What the hooks of one layer, or of several with the same input, do where `BatchState.packed` is.

    Args:
        names: of the layers, up to `parts.MOST_PARTS`.
        state: of the batch.
    """

    def __init__(self, names: Sequence[str], state: BatchState) -> None:
        self._names, self._state = tuple(names), state
        self._together: GroupedProducts | None = None

    def add(
        self, x: torch.Tensor, ys: Sequence[torch.Tensor], rows: torch.Tensor, each: int
    ) -> list[torch.Tensor] | None:
        """The outputs with the deltas of all groups added.

        Args:
            x: `[B * each, ..., M]`.
            ys: the base's output `[B * each, ..., N]` of each layer; changed in place if contiguous.
            rows: the groups' rows, from `BatchState.rows_in`.
            each: rows of x for a batch row.

        Returns:
            The outputs, or None (and `ys` as they were) where a variant's output is wider or narrower
            than the base's.
        """
        tokens = x.numel() // max(x.shape[-1], 1) // self._state.size
        if not tokens:
            return list(ys)
        forms, alone = self._split(ys, x.dtype, tokens)
        added: list[_Added] = []
        for part, y in enumerate(ys):
            mine = self._alone(x, rows, each, part, alone, y.shape[-1])
            if mine is None:
                return None
            added.append(mine)
        out = [y.contiguous() for y in ys]
        if any(form is not None for every in forms.values() for form in every):
            self._launch(x, out, forms, tokens)
        for y, mine in zip(out, added, strict=True):
            for some, delta in mine:
                y.index_add_(0, some, delta.to(y.dtype))
        return out

    def _split(
        self, ys: Sequence[torch.Tensor], dtype: torch.dtype, tokens: int
    ) -> tuple[dict[int, list[DeltaMatrix | None]], dict[tuple[int, int], DeltaMatrix]]:
        """Forms by slot: those that go together (None for layers without one), and the others by
        slot and layer.
        """
        from deltafold.runtime.kernels.triton.grouped import groupable

        together: dict[int, list[DeltaMatrix | None]] = {}
        alone: dict[tuple[int, int], DeltaMatrix] = {}
        longest = tokens * max(group.size for group in self._state.groups)
        for group in self._state.groups:
            chosen = together.setdefault(group.slot, [])
            for part, (name, y) in enumerate(zip(self._names, ys, strict=True)):
                form = group.variant.products.get(name)
                if form is not None and not groupable(form, y.shape[-1], dtype, longest):
                    alone[group.slot, part] = form
                    form = None
                chosen.append(form)
        return together, alone

    def _launch(
        self,
        x: torch.Tensor,
        ys: Sequence[torch.Tensor],
        forms: dict[int, list[DeltaMatrix | None]],
        tokens: int,
    ) -> None:
        from deltafold.runtime.kernels.triton.grouped import GroupedProducts

        if self._together is None:
            self._together = GroupedProducts(len(self._names))
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        segments = self._state.segments(tokens)
        outputs = [y.view(-1, y.shape[-1]) for y in ys]
        self._together.add(outputs, flat, forms, segments, self._state.capacity)

    def _alone(
        self,
        x: torch.Tensor,
        rows: torch.Tensor,
        each: int,
        part: int,
        alone: dict[tuple[int, int], DeltaMatrix],
        columns: int,
    ) -> _Added | None:
        """Products of other forms, and biases."""
        found, start = [], 0
        for group in self._state.groups:
            stop = start + group.size * each
            some = rows[start:stop]
            bias = group.variant.vectors_of(self._names[part]).get("bias")
            delta = None if bias is None else bias
            form = alone.get((group.slot, part))
            if form is not None:
                xs = x.index_select(0, some)
                product = form.matmul(xs.reshape(-1, xs.shape[-1]))
                product = product.reshape(*xs.shape[:-1], -1)
                delta = product if bias is None else product + bias.to(product.dtype)
            if delta is not None:
                if delta.shape[-1] != columns:
                    return None
                delta = delta.expand(len(some), *x.shape[1:-1], columns)
                if self._state.scales is not None:
                    scales = self._state.scales.repeat_interleave(each)[start:stop]
                    delta = delta * scales.reshape(-1, *[1] * (delta.dim() - 1)).to(delta.dtype)
                found.append((some, delta))
            start = stop
        return found
