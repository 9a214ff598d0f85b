"""The base's own products on a CPU, in float32: by oneDNN, from the weights as they lie.

torch multiplies float32 matrices by BLAS (MKL), which is slow where its makers did not look: on an AMD
EPYC with two cores oneDNN was 1.2 to 2.2 times as fast for 2 to 256 rows and matrices of 2^20 and more
entries. Single rows stay with BLAS, and so do small matrices, for which a call costs more than the
product. What is computed is the same up to the last bits of float32, for all rows of a batch alike.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import nn

#: Entries of a matrix from which on oneDNN is worth a call.
LEAST: Final = 2**20


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
        alone = x.numel() <= x.shape[-1]
        training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_contiguous()
        if alone or training or not plain or x.dtype != torch.float32:
            return self._plain(x)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y


def quicken(model: nn.Module, least: int = LEAST) -> list[str]:
    """Give linear layers on a CPU in float32 the faster product.

    Args:
        model: the model, on its device.
        least: entries of the smallest weight that is meant.

    Returns:
        Names of the layers.
    """
    if not _has_product():
        return []
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            continue
        weight = module.weight
        if (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and weight.numel() >= least
        ):
            cast(Any, module).forward = Product(module)
            found.append(name)
    return found


def _has_product() -> bool:
    # torch gives neither a type.
    onednn: Any = torch.backends.mkldnn
    return onednn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
