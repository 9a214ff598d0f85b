"""Base and packed delta added up in registers and multiplied, against float64."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from slices import BOUNDS, DEVICE, DTYPES, noise, random_kind, random_slice

from deltafold.runtime.kernels.triton.layout import Kind, values
from deltafold.runtime.kernels.triton.merge import merged_slices
from deltafold.runtime.kernels.triton.segments import MERGED_TOKENS, make_segments
from deltafold.runtime.kernels.triton.table import make_table

#: Several tiles of rows and columns, groups as wide as 16 columns, and column scales.
KINDS = {
    "1 bit": random_kind(1, 140, 530, half=True),
    "1 bit in groups": random_kind(1, 33, 130, group=48),
    "1 bit by column": replace(random_kind(1, 20, 70), by_column=True),
    "2 bits": random_kind(2, 130, 300, half=True),
    "4 bits": random_kind(4, 17, 33),
    "4 bits in groups": random_kind(4, 20, 150, group=64, half=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(KINDS))
def test_products_by_base_and_delta(name: str, dtype: torch.dtype) -> None:
    """Variants with 0 to 2 slices; tokens of the base are poison, and nobody reads them."""
    kind: Kind = KINDS[name]
    slots, tokens = 3, MERGED_TOKENS + 16
    pieces = [[(random_slice(kind, 7 * v + i), 30.0 + i) for i in range(v)] for v in range(slots)]
    base = torch.randn(kind.rows, kind.columns, generator=noise(2)).to(dtype)
    dense = []
    for each in pieces:
        total = base.float()
        for piece, weight in each:
            total = total + values(piece).cpu() * weight
        dense.append(total.double())
    table = make_table(kind.of_blocks, [pieces], DEVICE)
    # The last variant has two tiles, and what no variant has lies between.
    slot_of = torch.full((tokens,), slots - 1)
    slot_of[3:15] = torch.arange(12) % slots - 1
    x = torch.randn(tokens, kind.columns, generator=noise(3)).to(dtype)
    x[slot_of < 0] = torch.nan
    segments = make_segments(slot_of.to(DEVICE), slots, MERGED_TOKENS)
    found = merged_slices(x.to(DEVICE), base.to(DEVICE), table, segments).cpu().double()
    for slot in range(slots):
        mine = slot_of == slot
        expected = x[mine].double() @ dense[slot].T
        off = (found[mine] - expected).abs().max()
        # The sum of base and delta is rounded, and the product.
        assert off <= 2 * BOUNDS[dtype] * expected.abs().max(), slot
