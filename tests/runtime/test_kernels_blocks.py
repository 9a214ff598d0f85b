"""Blocks of rows: products and rows are those of the whole."""

from __future__ import annotations

import pytest
import torch

from deltafold.compress.terms import Blocks, Codes, Context, Exact, Planes, Sparse, Term
from deltafold.runtime.kernels.base import Stacked
from deltafold.runtime.kernels.forms import Target, product_form, table_form
from deltafold.runtime.kernels.reference import dense_delta

INNER = [Planes(bits=2), Codes(bits=4), Exact(), Sparse(mask="bitmap")]


@pytest.mark.parametrize("inner", INNER, ids=lambda t: t.id)
@pytest.mark.parametrize("rows", [7, 16, 40])
def test_blocks_are_applied_as_the_whole(inner: Term, rows: int) -> None:
    noise = torch.Generator().manual_seed(rows)
    base = torch.randn(40, 96, generator=noise)
    variant = base + torch.randn(40, 96, generator=noise) * 0.05
    context = Context("w", base, variant)
    made = Blocks(rows, (inner,)).encode(variant - base, context)
    exact = dense_delta([made], (40, 96), context)
    target = Target(torch.device("cpu"), torch.float32)
    x = torch.randn(3, 96, generator=noise)
    form = product_form([made], (40, 96), context, target)
    # Rows that stand for themselves make one matrix again; the others stay blocks.
    assert isinstance(form, Stacked) != isinstance(inner, Planes | Codes)
    expected = x.double() @ exact.double().T
    assert ((form.matmul(x).double() - expected).norm() / expected.norm()) < 2e-6
    index = torch.tensor([39, 0, 7, 7, 20])
    found = table_form([made], (40, 96), context, target).gather(index)
    assert (found - exact[index]).abs().max() < 1e-6
    assert table_form([made], (40, 96), context, target).gather(index[:0]).shape == (0, 96)
