"""Linear layers while prompts are read: where every variant of a batch has many tokens, each gets one
product by base and delta added up, and the base's own product is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels.merged import merged_product, merges


def merged_output(
    name: str, module: nn.Module, state: BatchState, x: torch.Tensor
) -> torch.Tensor | None:
    """A layer's output for a batch of long rows, or None where base and deltas are better apart.

    Rows of the base keep it apart as well: what they get must not depend on who else is in the batch.

    Args:
        name: of the layer.
        module: the layer, which is wrapped.
        state: of the batch.
        x: `[B, ..., M]`.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or type(weight) not in (torch.Tensor, nn.Parameter):
        return None
    if state.scales is not None or len(state.rows) != state.size or x.shape[0] % state.size:
        return None
    assert isinstance(weight, torch.Tensor)
    if x.dtype != weight.dtype or x.dim() < 2 or not weight.is_contiguous():
        return None
    tokens = x.numel() // max(x.shape[-1], 1) // state.size
    forms = [group.variant.products.get(name) for group in state.groups]
    sizes = [group.size * tokens for group in state.groups]
    if any(f is None or not merges(f, weight, n) for f, n in zip(forms, sizes, strict=True)):
        return None
    rows, each = state.rows_in(x.shape[0], name)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    start = 0
    for group, form in zip(state.groups, forms, strict=True):
        assert form is not None
        mine = rows[start : start + group.size * each]
        start += group.size * each
        bias = _bias(module, group.variant.vectors_of(name).get("bias"))
        xs = x.index_select(0, mine)
        found = merged_product(xs.reshape(-1, x.shape[-1]), weight.detach(), bias, form)
        y.index_copy_(0, mine, found.reshape(*xs.shape[:-1], -1))
    return y


def _bias(module: Any, delta: torch.Tensor | None) -> torch.Tensor | None:
    own: torch.Tensor | None = module.bias
    if delta is None:
        return None if own is None else own.detach()
    zero = torch.zeros_like(delta) if own is None else own.detach()
    return (zero.to(torch.float32) + delta).to(module.weight.dtype)
