"""The GPU kernels at drawn shapes, batches and magnitudes, each against float64."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from deltafold.runtime.kernels.base import DeltaMatrix, Sum, leaves
from deltafold.runtime.kernels.simple import Factors

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from slices import BOUNDS, DEVICE, DTYPES, exact, noise, random_factors, random_slices

from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.grouped import GroupedProducts, GroupedRows
from deltafold.runtime.kernels.triton.segments import block_for, make_segments
from deltafold.runtime.kernels.triton.sparse import sparse_rows

SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 150))
#: Bits of the slices, columns of a group (0: one), and whether low rank and lists come on top.
CODES = st.tuples(
    st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=2),
    st.sampled_from([0, 16, 48, 64]),
    st.sampled_from(["", "rank", "lists"]),
)
#: Shrinking takes minutes in the interpreter.
PHASES = (Phase.explicit, Phase.generate)
#: Variants, tokens of each in turn (base tokens too), and what one token is times.
BATCHES = st.tuples(st.integers(1, 5), st.integers(0, 20), st.sampled_from([1.0, 1e-3, 3e3]))


def made(shape: tuple[int, int], code: Any, seed: int, dtype: torch.dtype) -> DeltaMatrix:
    bits, group, more = code
    forms: list[DeltaMatrix] = [
        random_slices(bits, shape, seed, group=min(group, shape[1]) and group)
    ]
    if more == "rank":
        forms.append(random_factors(1 + seed % 70, shape, seed, dtype))
    if more == "lists":
        delta = torch.randn(shape, generator=noise(seed))
        lists = sparse_rows(delta * (delta.abs() > 1.5), DEVICE)
        forms += [] if lists is None else [lists]
    return forms[0] if len(forms) == 1 else Sum(forms)


def largest(form: DeltaMatrix) -> torch.Tensor:
    """What the entries could be if nothing cancelled."""
    found = []
    for leaf, _ in leaves(form):
        if isinstance(leaf, BitSlices):
            found += [exact(BitSlices((piece,))).abs() for piece in leaf.slices]
        elif isinstance(leaf, Factors):
            found.append(leaf.b.cpu().double().abs() @ leaf.a.cpu().double().abs())
        else:
            found.append(exact(leaf).abs())
    return torch.stack(found).sum(0)


@settings(max_examples=12, phases=PHASES)
@given(SHAPES, CODES, BATCHES, st.sampled_from(DTYPES), st.integers(0, 99))
@example((5, 3), ([1], 0, ""), (1, 0, 1.0), torch.float32, 0)
@example((1, 65), ([1], 64, ""), (1, 2, 1.0), torch.float32, 0)
@example((16, 40), ([1], 0, ""), (64, 65, 1.0), torch.bfloat16, 0)
@example((150, 140), ([4, 1], 64, "rank"), (3, 20, 3e3), torch.float16, 64)
def test_products_and_rows(
    shape: tuple[int, int], code: Any, batch: Any, dtype: torch.dtype, seed: int
) -> None:
    variants, tokens, times = batch
    forms = {v: made(shape, code, seed + v, dtype) for v in range(variants)}
    slots = torch.arange(tokens) % (variants + 1) - 1
    # One token stands out, and no other may notice.
    x = torch.randn(tokens, shape[1], generator=noise(seed)).to(dtype)
    x[:1] *= times
    x[-1:] = torch.nan if tokens and slots[-1] < 0 else x[-1:]
    ids = torch.randint(0, shape[0], (tokens,), generator=noise(seed))
    y = torch.zeros(tokens, shape[0], dtype=dtype, device=DEVICE)
    rows = torch.zeros(tokens, shape[1], dtype=dtype, device=DEVICE)
    longest = max(1, -(-tokens // (variants + 1)))
    segments = make_segments(slots.to(DEVICE), variants, block_for(longest))
    by_slot = {v: (form,) for v, form in forms.items()}
    GroupedProducts().add([y], x.to(DEVICE), by_slot, segments, variants)
    only = {v: f.terms[0] if isinstance(f, Sum) else f for v, f in forms.items()}
    GroupedRows().add(rows, ids.to(DEVICE), only, segments, variants)
    dense = {v: (exact(f), largest(f), exact(only[v]), largest(only[v])) for v, f in forms.items()}
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert not y[t].any()
            assert not rows[t].any()
            continue
        whole, most, table, most_of_row = dense[slot]
        # Each launch rounds what it adds to: one for each kind of slices, low rank and lists.
        bound = 3 * BOUNDS[dtype]
        off = (y[t].cpu().double() - whole @ x[t].double()).abs()
        assert (off <= bound * (most @ x[t].double().abs()) + 1e-7).all(), t
        off = (rows[t].cpu().double() - table[ids[t]]).abs()
        assert (off <= bound * most_of_row[ids[t]] + 1e-7).all(), t
