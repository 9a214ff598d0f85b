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

#: float16's smallest step; no unit of codes may be smaller.
_LEAST_EXPONENT = -24


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
        # Models that bring their activations to a weight's dtype know int8 as a quantised weight's.
        self.weight = nn.Parameter(packed.codes.view(torch.int8), requires_grad=False)
        self.register_buffer("absmax", packed.absmax, persistent=False)
        self.absmax: torch.Tensor
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` to `[..., out]`, in x's dtype.

        Raises:
            DeltafoldError: `engine-unsupported` where a model made x of its weight's dtype.
        """
        if not x.is_floating_point():
            raise DeltafoldError(
                "engine-unsupported",
                f"the model gives the layer of {self.tensor} its input as {x.dtype}, the dtype of "
                "its codes.",
                fix="serve this base without --base-quantization",
            )
        return self._nf4(x) if self.method == "nf4" else self._int8(x)

    def _int8(self, x: torch.Tensor) -> torch.Tensor:
        """Products with codes times a power of two, which rounds nothing, and the rest of the scale.

        The power is as near to a row's scale as can be: where a layer's own output fits into x's
        dtype, so do these products.
        """
        scale = self.absmax * INT8_STEP
        unit = torch.exp2((torch.frexp(scale)[1] - 1).clamp(min=_LEAST_EXPONENT).to(torch.float32))
        codes, rest = self.weight.to(x.dtype) * unit.to(x.dtype).unsqueeze(1), scale / unit
        if self.transposed:
            y = (x.to(torch.float32) * rest).to(x.dtype) @ codes
        else:
            y = (nn.functional.linear(x, codes).to(torch.float32) * rest).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def _nf4(self, x: torch.Tensor) -> torch.Tensor:
        import bitsandbytes as bnb

        state, codes = _state(self.absmax, self.shape, x.dtype), self.weight.view(torch.uint8)
        y: torch.Tensor
        if self.transposed:
            weight = bnb.functional.dequantize_4bit(codes, state)
            y = nn.functional.linear(x, weight.T, self.bias)
        else:
            y = bnb.matmul_4bit(x, codes.t(), state, bias=self.bias)
        return y

    def beside(self, bias: nn.Parameter | None) -> QuantizedLinear:
        """A layer of the same weight, held in the same memory, with a bias of its own."""
        packed = self._packed(self.weight.detach(), self.absmax)
        return QuantizedLinear(self.tensor, packed, bias, transposed=self.transposed).eval()

    def values(self) -> torch.Tensor:
        """The weight as the checkpoint lays it out: float32, on the CPU."""
        return self._packed(self.weight.detach().cpu(), self.absmax.cpu()).values()

    @property
    def nbytes(self) -> int:
        """Memory of the weight, in bytes."""
        return self._packed(self.weight, self.absmax).nbytes

    def _packed(self, codes: torch.Tensor, absmax: torch.Tensor) -> Packed:
        own = codes.view(torch.uint8) if self.method == "nf4" else codes
        return Packed(self.method, own, absmax, self.shape)


def quantization_in(model: nn.Module) -> Quantization | None:
    """How a model's linear layers are quantised; None where none is."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if not layers:
        return None
    (method,) = {layer.method for layer in layers}
    names = tuple(sorted(layer.tensor for layer in layers))
    return Quantization(method=method, block=block_of(method), tensors=names)


def _state(absmax: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """What bitsandbytes wants to know of 4-bit codes besides themselves."""
    import bitsandbytes as bnb

    return bnb.functional.QuantState(
        absmax, shape=torch.Size(shape), code=None, blocksize=BLOCK, quant_type="nf4", dtype=dtype
    )


def need_bitsandbytes(device: torch.device) -> None:
    """Import it quietly, and have it compute once where the model will be.

    Raises:
        DeltafoldError: `missing-extra`.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    # It warns of an optional kernel that is not used here.
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401

        # Without a library for this CUDA it can be imported, and fails when it is used.
        _try_products(device)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, OSError, ValueError, TypeError, AttributeError) as error:
        raise DeltafoldError(
            "missing-extra",
            f"a 4-bit base needs bitsandbytes, which cannot be used on {device}.",
            facts=[("reason", (str(error) or repr(error)).splitlines()[0])],
            fix="pip install 'deltafold[quant]'",
        ) from error
    finally:
        log.setLevel(level)


@torch.no_grad()
def _try_products(device: torch.device) -> None:
    """Multiply by a matrix whose columns are 1 and -1 in turn, for one request and for several.

    Each number of rows, and each way of keeping a weight, goes through a kernel of its own.

    Raises:
        RuntimeError: where the values or products are others.
    """
    codes = torch.full((BLOCK * BLOCK // 2, 1), 0xF0, dtype=torch.uint8, device=device)
    ones = torch.ones(BLOCK, device=device, dtype=torch.float32)
    packed = Packed("nf4", codes, ones, (BLOCK, BLOCK))
    for transposed in (False, True):
        layer = QuantizedLinear("a trial", packed, None, transposed=transposed)
        signs = torch.tensor([1.0, -1.0]).repeat(BLOCK // 2)
        expected = signs.repeat(8, 1) if transposed else signs[:8, None].repeat(1, BLOCK)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows in (1, 8):
                found = layer(torch.eye(rows, BLOCK, dtype=dtype, device=device))
                if not torch.equal(found.float().cpu(), expected[:rows]):
                    raise RuntimeError(f"its products of {rows} rows are wrong on {device}")


def is_quantized(module: Any) -> bool:
    """Whether a module keeps its weight quantised."""
    return isinstance(module, QuantizedLinear)
