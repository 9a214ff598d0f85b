"""Products in float32 on a CPU by oneDNN, from weights as they lie.

torch multiplies float32 matrices by BLAS (MKL), which is slow where its makers did not look: on an AMD
EPYC with two cores oneDNN was 1.2 to 2.2 times as fast for 2 to 256 rows and matrices of 2^20 and more
entries (torch 2.13, 2026-11-24, `benchmarks/linear.py` has both). Single rows stay with BLAS, and so do
small matrices, for which a call costs more than the product. What is computed is the same up to the
last bits of float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch

#: Entries of a matrix from which on oneDNN is worth a call.
LEAST: Final = 2**20


@cache
def has_onednn() -> bool:
    """Whether this torch has the product."""
    # torch gives neither a type.
    onednn: Any = torch.backends.mkldnn
    return bool(onednn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` by the faster library; x `[..., M]`, weight `[N, M]`, without gradients."""
    fits = x.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu"
    many = x.numel() > x.shape[-1] and weight.numel() >= LEAST
    if not (fits and many and has_onednn() and weight.is_contiguous()):
        return torch.nn.functional.linear(x, weight, bias)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
