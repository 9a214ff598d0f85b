"""Packed tables of all variants, looked up in one launch; vocabularies of several sizes in one head."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels.base import Scaled, Sum
from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.layers import EmbeddingHook, LinearHook
from deltafold.runtime.loading import LoadedVariant

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from slices import BOUNDS, DEVICE, DTYPES, assignments, noise, random_slice

from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.grouped import GroupedRows
from deltafold.runtime.kernels.triton.layout import Kind, values
from deltafold.runtime.kernels.triton.segments import make_segments

COLUMNS = 100


def table(
    rows: int, bits: list[int], seed: int, group: int = 0, by_column: bool = False
) -> BitSlices:
    kinds = [Kind(b, rows, COLUMNS, group or COLUMNS, by_column, torch.float16) for b in bits]
    return BitSlices(tuple(random_slice(kind, seed + i) for i, kind in enumerate(kinds)))


def dense(form: BitSlices) -> torch.Tensor:
    return torch.stack([values(piece).cpu().double() for piece in form.slices]).sum(0)


@pytest.mark.parametrize("pattern", list(assignments(1, 1)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_token_gets_its_row_of_its_variants_table(pattern: str, dtype: torch.dtype) -> None:
    """Two planes, 3 bits in groups, columns with scales, and a mixture, of vocabularies that differ."""
    forms = [
        table(40, [1, 1], 0),
        table(37, [2, 1], 10, group=16),
        table(300, [1], 20, by_column=True),
        table(40, [4], 30),
    ]
    mixed = Sum([Scaled(forms[0], 0.5), Scaled(forms[3], -2.0)])
    exact = [dense(form) for form in forms] + [0.5 * dense(forms[0]) - 2 * dense(forms[3])]
    given = assignments(21, 5)[pattern]
    ids = torch.randint(0, 37, (21,), generator=noise(3))
    y = torch.randn(21, COLUMNS, generator=noise(4)).to(dtype)
    y[given < 0] = torch.nan
    scales = torch.rand(21, generator=noise(5))
    out = y.clone().to(DEVICE)
    segments = make_segments(given.to(DEVICE), 5, 16, scales.to(DEVICE))
    GroupedRows().add(out, ids.to(DEVICE), dict(enumerate([*forms, mixed])), segments, 5)
    for t, slot in enumerate(given.tolist()):
        if slot < 0:
            assert torch.isnan(out[t]).all()
            continue
        expected = y[t].double() + scales[t].double() * exact[slot][ids[t]]
        off = (out[t].cpu().double() - expected).abs().max()
        assert off <= 4 * BOUNDS[dtype] * expected.abs().max(), t


def test_ids_beyond_a_smaller_vocabulary_stay_inside() -> None:
    form = table(20, [1], 0)
    y = torch.zeros(3, COLUMNS, device=DEVICE)
    ids = torch.tensor([19, 20, 4000], device=DEVICE)
    segments = make_segments(torch.zeros(3, dtype=torch.int64, device=DEVICE), 1, 8)
    GroupedRows().add(y, ids, {0: form}, segments, 1)
    assert torch.allclose(y.cpu().double(), dense(form)[19].expand(3, -1), rtol=1e-6)


def state_of_packed() -> BatchState:
    state = BatchState(DEVICE)
    state.packed = True
    return state


def variant(name: str, **forms: object) -> LoadedVariant:
    made = LoadedVariant(name, Path())
    for module, form in forms.items():
        made.products[module] = form  # type: ignore[assignment]
        made.tables[module] = form  # type: ignore[assignment]
    return made


def test_an_embedding_serves_packed_and_dense_tables_together() -> None:
    module = nn.Embedding(40, COLUMNS).to(DEVICE).requires_grad_(False)
    packed, more = table(40, [2], 0), table(43, [1], 5)
    plain = torch.randn(40, COLUMNS, generator=noise(1))
    rows = [
        (variant("a", m=packed), 1.0),
        (None, 1.0),
        (variant("b", m=Dense(plain.to(DEVICE))), 0.5),
        (variant("c", m=more), 2.0),
    ]
    state = state_of_packed()
    hook = EmbeddingHook("m", module, state)
    ids = torch.tensor([[3, 39], [0, 1], [7, 3], [42, 5]])
    with state.running(rows):
        found = hook(ids.to(DEVICE)).cpu()
    base = torch.cat([module.weight.cpu(), torch.zeros(3, COLUMNS)])
    deltas = [dense(packed), torch.zeros(40, COLUMNS), 0.5 * plain, 2 * dense(more)]
    for row, (expected, delta) in enumerate(zip(base[ids], deltas, strict=True)):
        expected = expected + delta[ids[row]]
        assert torch.allclose(found[row].double(), expected.double(), rtol=1e-4, atol=1e-5), row
    assert torch.equal(found[1], base[ids[1]])


def test_a_head_serves_vocabularies_of_all_sizes() -> None:
    """More and fewer tokens than the base; packed, dense, and a variant that leaves the head alone."""
    module = nn.Linear(COLUMNS, 40, bias=False).to(DEVICE).requires_grad_(False)
    forms = {"a": table(43, [2], 0), "b": table(31, [1, 4], 3), "d": table(40, [1], 9)}
    plain = torch.randn(45, COLUMNS, generator=noise(1))
    rows = [
        *[(variant(name, m=form), 1.0) for name, form in forms.items()],
        (variant("c", m=Dense(plain.to(DEVICE))), 0.5),
        (variant("e"), 1.0),
        (None, 1.0),
    ]
    state = state_of_packed()
    hook = LinearHook("m", module, state)
    x = torch.randn(len(rows), 2, COLUMNS, generator=noise(2))
    with state.running(rows):
        found = hook(x.to(DEVICE)).cpu()
    assert found.shape == (len(rows), 2, 45)
    deltas = [*[dense(form) for form in forms.values()], 0.5 * plain.double()]
    deltas += [torch.zeros(40, COLUMNS, dtype=torch.float64)] * 2
    for row, delta in enumerate(deltas):
        weight = torch.zeros_like(delta)
        known = min(40, len(delta))
        weight[:known] = module.weight[:known].cpu()
        expected = x[row].double() @ (weight + delta).T
        assert torch.allclose(found[row, :, : len(delta)].double(), expected, rtol=1e-4, atol=1e-4)
        assert bool((found[row, :, len(delta) :] == -torch.inf).all()), row
