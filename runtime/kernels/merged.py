"""Many tokens of one variant: a product by base and delta added up, in place of two products.

The sum is made anew for each product. On a CPU it is made a few rows at a time, which stay in its
caches; on a GPU in one pass at copy speed, or in registers (`triton/merge.py`). It is rounded to the
model's dtype, as a merged checkpoint would be. Where a form cannot be rebuilt cheaply, and for few
tokens, base and delta stay apart.
"""

from __future__ import annotations

from typing import Final

import torch

from deltafold.runtime.kernels.base import DeltaMatrix, leaves
from deltafold.runtime.kernels.devices import applies_packed
from deltafold.runtime.kernels.onednn import product
from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.kernels.signs import BLOCK_ROWS, SignWords

#: Tokens from which adding up costs less than a second product, by planes of sign words on a CPU
#: (`benchmarks/linear.py --crossings`).
_SIGNS_FROM: Final = {1: 128, 2: 48, 3: 32}
_SIGNS_FROM_ELSE: Final = 24
_DENSE_FROM: Final = 64
#: Entries that are added up at a time on a CPU.
_PIECE: Final = 2**20


def merges(form: DeltaMatrix, weight: torch.Tensor, tokens: int) -> bool:
    """Whether so many tokens are served faster by base and delta added up.

    Args:
        form: of one variant.
        weight: the base's, `[N, M]`.
        tokens: of this variant.
    """
    if applies_packed(weight.device):
        from deltafold.runtime.kernels.triton.forms import REBUILD_ABOVE, BitSlices
        from deltafold.runtime.kernels.triton.sparse import SparseRows

        if not isinstance(form, BitSlices | SparseRows):
            return False
        return form.shape == tuple(weight.shape) and tokens > REBUILD_ABOVE
    every = [leaf for leaf, _ in leaves(form)]
    on_cpu = weight.device.type == "cpu"
    return on_cpu and all(_merges_here(leaf, weight, tokens) for leaf in every)


def _merges_here(leaf: DeltaMatrix, weight: torch.Tensor, tokens: int) -> bool:
    if isinstance(leaf, SignWords):
        least = _SIGNS_FROM.get(leaf.levels.shape[0], _SIGNS_FROM_ELSE)
        return tokens >= least and (leaf.rows, leaf.columns) == tuple(weight.shape)
    return isinstance(leaf, Dense) and tokens >= _DENSE_FROM and leaf.weight.shape == weight.shape


def merged_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    form: DeltaMatrix,
) -> torch.Tensor:
    """`x (W + D)^T + b`.

    Args:
        x: `[k, M]` of the model's dtype.
        weight: the base's `[N, M]`.
        bias: `[N]` of the model's dtype, or None.
        form: a delta that `merges`.
    """
    if applies_packed(weight.device):
        from deltafold.runtime.kernels.triton.forms import BitSlices
        from deltafold.runtime.kernels.triton.sparse import SparseRows

        assert isinstance(form, BitSlices | SparseRows)
        return torch.nn.functional.linear(x, form.dense(weight.dtype, weight), bias)
    rows, columns = weight.shape
    step = max(1, _PIECE // max(columns * BLOCK_ROWS, 1)) * BLOCK_ROWS
    pieces = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        total = weight[start:stop].to(torch.float32, copy=True)
        for leaf, factor in leaves(form):
            total.add_(_rows(leaf, start, stop), alpha=factor)
        some = None if bias is None else bias[start:stop]
        pieces.append(product(x, total.to(weight.dtype), some))
    return torch.cat(pieces, 1)


def _rows(leaf: DeltaMatrix, start: int, stop: int) -> torch.Tensor:
    if isinstance(leaf, SignWords):
        return leaf.dense(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS))
    assert isinstance(leaf, Dense), type(leaf)
    return leaf.weight[start:stop].to(torch.float32)
