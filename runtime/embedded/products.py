"""The base's own products on a CPU, in float32, by the faster library (see `kernels.onednn`)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from deltafold.runtime.kernels import onednn


class Product:
    """`y = x W^T + b` of one linear layer."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module
        self._plain = module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., M]` to `[..., N]`."""
        module = self._module
        # The parameters of this very call: a module may be lent others.
        weight, bias = module.weight, module.bias
        training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if training or type(weight) not in (torch.Tensor, nn.Parameter):
            return self._plain(x)
        return onednn.product(x, weight, bias)


def quicken(model: nn.Module) -> list[str]:
    """Give linear layers on a CPU in float32 the faster product, where they are large enough for it.

    Returns:
        Names of the layers.
    """
    if not onednn.has_onednn():
        return []
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            continue
        weight = module.weight
        here = weight.device.type == "cpu" and weight.dtype == torch.float32
        if here and weight.numel() >= onednn.LEAST:
            cast(Any, module).forward = Product(module)
            found.append(name)
    return found
