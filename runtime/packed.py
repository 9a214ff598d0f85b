"""A linear layer's deltas on a GPU: those in packed forms by one launch for all variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels.base import DeltaMatrix

if TYPE_CHECKING:
    from deltafold.runtime.kernels.triton.grouped import GroupedProducts


class PackedLayer:
    """What one layer's hook does where `BatchState.packed` is set."""

    def __init__(self, name: str, state: BatchState) -> None:
        self._name, self._state = name, state
        self._together: GroupedProducts | None = None

    def add(
        self, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, each: int
    ) -> torch.Tensor | None:
        """y with the deltas of all groups added.

        Args:
            x: `[B * each, ..., M]`.
            y: the base's output `[B * each, ..., N]`; changed in place if it is contiguous.
            rows: the groups' rows, from `BatchState.rows_in`.
            each: rows of x for a batch row.

        Returns:
            y, or None (and y as it was) where a variant's output is wider or narrower than the base's.
        """
        columns = y.shape[-1]
        tokens = x.numel() // max(x.shape[-1], 1) // self._state.size
        if not tokens:
            return y
        forms, alone = self._split(columns, x.dtype, tokens)
        added = self._alone(x, rows, each, alone, columns)
        if added is None:
            return None
        y = y.contiguous()
        if any(form is not None for form in forms.values()):
            self._launch(x, y, forms, tokens)
        for part, delta in added:
            y.index_add_(0, part, delta.to(y.dtype))
        return y

    def _split(
        self, columns: int, dtype: torch.dtype, tokens: int
    ) -> tuple[dict[int, DeltaMatrix | None], dict[int, DeltaMatrix]]:
        """Forms by slot: those that go together (None for slots without one), and the others."""
        from deltafold.runtime.kernels.triton.grouped import groupable

        together: dict[int, DeltaMatrix | None] = {}
        alone: dict[int, DeltaMatrix] = {}
        longest = tokens * max(group.size for group in self._state.groups)
        for group in self._state.groups:
            form = group.variant.products.get(self._name)
            if form is None or groupable(form, columns, dtype, longest):
                together[group.slot] = form
            else:
                together[group.slot], alone[group.slot] = None, form
        return together, alone

    def _launch(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        forms: dict[int, DeltaMatrix | None],
        tokens: int,
    ) -> None:
        from deltafold.runtime.kernels.triton.grouped import GroupedProducts

        if self._together is None:
            self._together = GroupedProducts()
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        segments = self._state.segments(tokens)
        by_slot = {slot: (form,) for slot, form in forms.items()}
        ys = [y.view(-1, y.shape[-1])]
        self._together.add(ys, flat, by_slot, segments, self._state.capacity)

    def _alone(
        self,
        x: torch.Tensor,
        rows: torch.Tensor,
        each: int,
        alone: dict[int, DeltaMatrix],
        columns: int,
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Rows and what is added to them: products of other forms, and biases."""
        found, start = [], 0
        for group in self._state.groups:
            stop = start + group.size * each
            part = rows[start:stop]
            bias = group.variant.vectors_of(self._name).get("bias")
            delta = None if bias is None else bias
            if group.slot in alone:
                xs = x.index_select(0, part)
                product = alone[group.slot].matmul(xs.reshape(-1, xs.shape[-1]))
                product = product.reshape(*xs.shape[:-1], -1)
                delta = product if bias is None else product + bias.to(product.dtype)
            if delta is not None:
                if delta.shape[-1] != columns:
                    return None
                delta = delta.expand(len(part), *x.shape[1:-1], columns)
                if self._state.scales is not None:
                    scales = self._state.scales.repeat_interleave(each)[start:stop]
                    delta = delta * scales.reshape(-1, *[1] * (delta.dim() - 1)).to(delta.dtype)
                found.append((part, delta))
            start = stop
        return found
