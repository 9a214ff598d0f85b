"""Deltas of linear layers and tables on a GPU: those in packed forms by one launch for all variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels.base import DeltaMatrix

if TYPE_CHECKING:
    from deltafold.runtime.kernels.triton.grouped import GroupedProducts, GroupedRows

#: Rows of an output, and what is added to them, by slot.
_Added: TypeAlias = dict[int, tuple[torch.Tensor, torch.Tensor]]


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
    ) -> list[torch.Tensor]:
        """The outputs with the deltas of all groups added.

        Args:
            x: `[B * each, ..., M]`.
            ys: the base's output `[B * each, ..., N]` of each layer; changed in place if contiguous.
            rows: the groups' rows, from `BatchState.rows_in`.
            each: rows of x for a batch row.

        Returns:
            The outputs. Where variants have other vocabularies they are as wide as the widest, with
            minus infinity for tokens that a row's variant does not have.
        """
        tokens = x.numel() // max(x.shape[-1], 1) // self._state.size
        if not tokens:
            return list(ys)
        forms, alone = self._split(ys, x.dtype, tokens)
        added = [self._alone(x, rows, each, part, alone) for part in range(len(ys))]
        out = [
            self._fitting(y.contiguous(), rows, each, part, forms, added[part])
            for part, y in enumerate(ys)
        ]
        if any(form is not None for every in forms.values() for form in every):
            self._launch(x, out, forms, tokens)
        for y, mine in zip(out, added, strict=True):
            for some, delta in mine.values():
                missing = y.shape[-1] - delta.shape[-1]
                delta = torch.nn.functional.pad(delta, (0, missing)) if missing else delta
                y.index_add_(0, some, delta.to(y.dtype))
        return out

    def _fitting(
        self,
        y: torch.Tensor,
        rows: torch.Tensor,
        each: int,
        part: int,
        forms: dict[int, list[DeltaMatrix | None]],
        added: _Added,
    ) -> torch.Tensor:
        """An output that the widest variant fits in."""
        from deltafold.runtime.kernels.triton.grouped import rows_of

        base, widths = y.shape[-1], {}
        for group in self._state.groups:
            form = forms[group.slot][part]
            own = base if form is None else rows_of(form, base)
            if group.slot in added:
                own = added[group.slot][1].shape[-1]
            widths[group.slot] = own
        if set(widths.values()) <= {base}:
            return y
        wide = torch.nn.functional.pad(
            y, (0, max(base, *widths.values()) - base), value=float("-inf")
        )
        start = 0
        for group in self._state.groups:
            stop = start + group.size * each
            own = widths[group.slot]
            if own != base:
                # What a variant adds beyond the base's columns is its whole value there.
                wide[rows[start:stop], ..., base:own] = 0
                wide[rows[start:stop], ..., own:] = float("-inf")
            start = stop
        return wide

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
    ) -> _Added:
        """Products of other forms, and biases, by slot."""
        found, start = {}, 0
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
                delta = delta.expand(len(some), *x.shape[1:-1], delta.shape[-1])
                if self._state.scales is not None:
                    scales = self._state.scales.repeat_interleave(each)[start:stop]
                    delta = delta * scales.reshape(-1, *[1] * (delta.dim() - 1)).to(delta.dtype)
                found[group.slot] = (some, delta)
            start = stop
        return found


class PackedRows:
    """What the hook of an embedding does where `BatchState.packed` is set.

    Args:
        name: of the embedding.
        state: of the batch.
    """

    def __init__(self, name: str, state: BatchState) -> None:
        self._name, self._state = name, state
        self._together: GroupedRows | None = None

    def add(self, y: torch.Tensor, ids: torch.Tensor) -> set[int]:
        """Add the rows of all variants whose tables are packed.

        Args:
            y: the base's rows, contiguous, `[B, ..., M]`; changed in place.
            ids: int64 `[B, ...]`.

        Returns:
            The slots that are done.
        """
        from deltafold.runtime.kernels.triton.grouped import GroupedRows, sliced_rows

        forms = {}
        for group in self._state.groups:
            table = group.variant.tables.get(self._name)
            forms[group.slot] = table if table is not None and sliced_rows(table) else None
        done = {slot for slot, form in forms.items() if form is not None}
        if not done or not ids.numel():
            return done
        if self._together is None:
            self._together = GroupedRows()
        segments = self._state.segments(ids.numel() // self._state.size)
        flat = y.view(-1, y.shape[-1])
        self._together.add(
            flat, ids.reshape(-1).contiguous(), forms, segments, self._state.capacity
        )
        return done
