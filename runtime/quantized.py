"""A linear layer that keeps its weight in 4 or 8 bits and computes with the values these stand for.

The values are those of `deltafold.compress.quantized`, whatever the device, so that a delta taken
against them is added to just these. bitsandbytes multiplies 4-bit weights; its own layers are not
used: on some CPUs `Linear4bit` rounds scales and activations to bfloat16, and `Linear8bitLt` rounds
activations to 8 bits, so neither computes the product with the values.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from deltafold.compress import DeltafoldError
from deltafold.compress.manifest import Quantization
from deltafold.compress.quantized import BLOCK, INT8_STEP, Packed, block_of

#: 8-bit codes are halved so often that no sum of products leaves float16's range.
_CODE_UNIT = 2.0**-7


class QuantizedLinear(nn.Module):
    """`y = x W^T + b` with a quantised W, or `y = x W + b` where the layer keeps `[in, out]`.

    Args:
        tensor: the checkpoint's name of the weight.
        packed: its codes.
        bias: the layer's own, or None.
        transposed: whether the checkpoint keeps the weight as `[in, out]`.
    """

    def __init__(
        self, tensor: str, packed: Packed, bias: nn.Parameter | None, *, transposed: bool
    ) -> None:
        super().__init__()
        self.tensor, self.method, self.shape = tensor, packed.method, packed.shape
        self.transposed = transposed
        columns, rows = packed.shape if transposed else packed.shape[::-1]
        self.in_features, self.out_features = columns, rows
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        self.register_buffer("absmax", packed.absmax, persistent=False)
        self.absmax: torch.Tensor
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` to `[..., out]`, in x's dtype."""
        if self.method == "nf4":
            return self._nf4(x)
        codes = self.weight.to(x.dtype) * _CODE_UNIT
        scale = self.absmax * (INT8_STEP / _CODE_UNIT)
        if self.transposed:
            y = (x.to(torch.float32) * scale).to(x.dtype) @ codes
        else:
            y = (nn.functional.linear(x, codes).to(torch.float32) * scale).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def _nf4(self, x: torch.Tensor) -> torch.Tensor:
        import bitsandbytes as bnb

        state = bnb.functional.QuantState(
            self.absmax,
            shape=torch.Size(self.shape),
            code=None,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=x.dtype,
        )
        y: torch.Tensor
        if self.transposed:
            weight = bnb.functional.dequantize_4bit(self.weight, state)
            y = nn.functional.linear(x, weight.T, self.bias)
        else:
            y = bnb.matmul_4bit(x, self.weight.t(), state, bias=self.bias)
        return y

    def beside(self, bias: nn.Parameter | None) -> QuantizedLinear:
        """A layer of the same weight, held in the same memory, with a bias of its own."""
        packed = Packed(self.method, self.weight.detach(), self.absmax, self.shape)
        return QuantizedLinear(self.tensor, packed, bias, transposed=self.transposed).eval()

    def values(self) -> torch.Tensor:
        """The weight as the checkpoint lays it out: float32, on the CPU."""
        codes, absmax = self.weight.detach().cpu(), self.absmax.cpu()
        return Packed(self.method, codes, absmax, self.shape).values()

    @property
    def nbytes(self) -> int:
        """Memory of the weight, in bytes."""
        return Packed(self.method, self.weight, self.absmax, self.shape).nbytes


def quantization_in(model: nn.Module) -> Quantization | None:
    """How a model's linear layers are quantised; None where none is."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if not layers:
        return None
    (method,) = {layer.method for layer in layers}
    names = tuple(sorted(layer.tensor for layer in layers))
    return Quantization(method=method, block=block_of(method), tensors=names)


def need_bitsandbytes() -> None:
    """Import it quietly.

    Raises:
        DeltafoldError: `missing-extra`.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    # It warns of an optional kernel that is not used here.
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise DeltafoldError(
            "missing-extra",
            "a 4-bit base needs bitsandbytes, which cannot be imported.",
            facts=[("reason", error)],
            fix="pip install 'deltafold[quant]'",
        ) from error
    finally:
        log.setLevel(level)


def is_quantized(module: Any) -> bool:
    """Whether a module keeps its weight quantised."""
    return isinstance(module, QuantizedLinear)
