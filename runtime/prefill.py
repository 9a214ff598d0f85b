"""Linear layers while prompts are read: where every variant of a batch has many tokens, each gets one
product by base and delta added up, and the base's own product is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels.base import DeltaMatrix
from deltafold.runtime.kernels.merged import merged_product, merges

if TYPE_CHECKING:
    from deltafold.runtime.kernels.triton.merge import MergedProducts


class MergedLayer:
    """What the hook of a linear layer does where the rows of all variants in a batch are long.

    Args:
        name: of the layer.
        module: the layer, which is wrapped.
        state: of the batch.
    """

    def __init__(self, name: str, module: nn.Module, state: BatchState) -> None:
        self._name, self._module, self._state = name, module, state
        self._together: MergedProducts | None = None

    def output(self, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output, or None where base and deltas are better apart.

        Rows of the base keep it apart as well: what they get must not depend on who else is in the
        batch.

        Args:
            x: `[B, ..., M]`.
        """
        state, module = self._state, self._module
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or type(weight) not in (torch.Tensor, nn.Parameter):
            return None
        if state.scales is not None or len(state.rows) != state.size or x.shape[0] % state.size:
            return None
        assert isinstance(weight, torch.Tensor)
        if x.dtype != weight.dtype or x.dim() < 2 or not weight.is_contiguous():
            return None
        tokens = x.numel() // max(x.shape[-1], 1) // state.size
        forms = [group.variant.products.get(self._name) for group in state.groups]
        sizes = [group.size * tokens for group in state.groups]
        if any(f is None or not merges(f, weight, n) for f, n in zip(forms, sizes, strict=True)):
            return None
        if state.packed:
            from deltafold.runtime.kernels.triton.merge import merge_together

            if merge_together(forms, x.dtype):
                return self._launched(x, weight.detach(), forms, tokens)
        return self._one_by_one(x, weight.detach(), forms)

    def _one_by_one(
        self, x: torch.Tensor, weight: torch.Tensor, forms: Sequence[DeltaMatrix | None]
    ) -> torch.Tensor:
        """A product a variant."""
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for (mine, bias), form in zip(self._rows(x), forms, strict=True):
            assert form is not None
            xs = x.index_select(0, mine)
            found = merged_product(xs.reshape(-1, x.shape[-1]), weight, bias, form)
            y.index_copy_(0, mine, found.reshape(*xs.shape[:-1], -1))
        return y

    def _launched(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        forms: Sequence[DeltaMatrix | None],
        tokens: int,
    ) -> torch.Tensor:
        """One launch for all variants."""
        from deltafold.runtime.kernels.triton.forms import BitSlices
        from deltafold.runtime.kernels.triton.merge import MergedProducts
        from deltafold.runtime.kernels.triton.segments import MERGED_TOKENS

        if self._together is None:
            self._together = MergedProducts()
        by_slot = {
            group.slot: form
            for group, form in zip(self._state.groups, forms, strict=True)
            if isinstance(form, BitSlices)
        }
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        segments = self._state.segments(tokens, MERGED_TOKENS)
        y = self._together.product(flat, weight, by_slot, segments, self._state.capacity)
        y = y.view(*x.shape[:-1], -1)
        biases = self._rows(x)
        if all(bias is biases[0][1] for _, bias in biases):
            return y if biases[0][1] is None else y.add_(biases[0][1])
        for mine, bias in biases:
            if bias is not None:
                y.index_add_(0, mine, bias.expand(len(mine), *y.shape[1:]))
        return y

    def _rows(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The rows of x that each group has, and its bias: the layer's own if it has no other."""
        rows, each = self._state.rows_in(x.shape[0], self._name)
        held = self._module.bias
        own = held.detach() if isinstance(held, torch.Tensor) else None
        found, start = [], 0
        for group in self._state.groups:
            stop = start + group.size * each
            delta = group.variant.vectors_of(self._name).get("bias")
            found.append((rows[start:stop], own if delta is None else _bias(own, delta, x.dtype)))
            start = stop
        return found


def _bias(own: torch.Tensor | None, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zero = torch.zeros_like(delta) if own is None else own
    return (zero.to(torch.float32) + delta).to(dtype)
