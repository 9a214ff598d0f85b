"""One batch's arithmetic serves any assignment of its size: as a captured graph where there is a GPU,
step by step in the interpreter elsewhere. What kernels allocate for themselves is poison at first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltafold.compress import parse_spec
from deltafold.compress.terms import Context
from deltafold.runtime.kernels.base import DeltaMatrix, Scaled, Sum

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from slices import (
    BOUNDS,
    DEVICE,
    DTYPES,
    assignments,
    exact,
    noise,
    random_factors,
    random_slices,
)

from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.kernels.triton import launch, lowrank
from deltafold.runtime.kernels.triton.grouped import GroupedProducts, GroupedRows
from deltafold.runtime.kernels.triton.segments import make_segments
from deltafold.runtime.kernels.triton.sparse import sparse_rows, strata

ROWS, COLUMNS, SLOTS, TOKENS = (40, 24), 160, 3, 7
#: Launches of a form, each of which rounds the outputs that it adds to; one where not named.
LAUNCHES = {"3 bits in groups": 2, "mixture": 3}
Make = Callable[[tuple[int, int], int, torch.dtype], DeltaMatrix]


def lists(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> DeltaMatrix:
    delta = torch.randn(shape, generator=noise(seed))
    form = sparse_rows(delta * (torch.rand(shape, generator=noise(seed + 9)) > 0.9), DEVICE)
    assert form is not None
    return form


def layers(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> DeltaMatrix:
    delta = torch.randn(shape, generator=noise(seed))
    ((term, parts),) = parse_spec("nm:keep=1,of=8,bits=3").encode(delta, Context("w"))
    form = strata(term, parts, shape, DEVICE, "w")  # type: ignore[arg-type]
    assert form is not None
    return form


def random_dense(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> Dense:
    return Dense(torch.randn(shape, generator=noise(seed)).to(DEVICE, dtype))


def mixture(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> DeltaMatrix:
    parts = [lists(shape, seed, dtype), random_factors(5, shape, seed, dtype)]
    return Sum([random_slices([1], shape, seed), *[Scaled(part, 0.5) for part in parts]])


FORMS: dict[str, Make] = {
    "1 bit": lambda shape, seed, dtype: random_slices([1], shape, seed),
    "3 bits in groups": lambda shape, seed, dtype: random_slices([2, 1], shape, seed, group=32),
    "4 bits": lambda shape, seed, dtype: random_slices([4], shape, seed),
    "lists": lists,
    "strata": layers,
    "low rank": lambda shape, seed, dtype: random_factors(70 - 20 * (seed % 3), shape, seed, dtype),
    "dense": random_dense,
    "mixture": mixture,
}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing was written to yet has NaN, and the columns are split."""
    plain = torch.empty

    def empty(*shape: Any, **options: Any) -> torch.Tensor:
        made = plain(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)
    for module in (launch, lowrank):
        monkeypatch.setattr(module, "splits_for", lambda *_: 2)


def repeated(step: Callable[[], None]) -> Callable[[], object]:
    """The step, as a graph where there is a GPU, after it ran once."""
    step()
    if DEVICE.type != "cuda":
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(FORMS))
def test_products_of_any_assignment(name: str, dtype: torch.dtype) -> None:
    forms = {
        v: [FORMS[name]((n, COLUMNS), 10 * p + v, dtype) for p, n in enumerate(ROWS)]
        for v in range(SLOTS)
    }
    dense = {v: [exact(form) for form in parts] for v, parts in forms.items()}
    given = torch.randn(TOKENS, COLUMNS, generator=noise(5)).to(dtype)
    x = torch.empty(TOKENS, COLUMNS, dtype=dtype, device=DEVICE)
    ys = [torch.zeros(TOKENS, n, dtype=dtype, device=DEVICE) for n in ROWS]
    slots = torch.zeros(TOKENS, dtype=torch.int64, device=DEVICE)
    layer = GroupedProducts(len(ROWS))

    def step() -> None:
        for y in ys:
            y.zero_()
        layer.add(ys, x, forms, make_segments(slots, SLOTS, 8), SLOTS)

    again = repeated(step)
    for pattern, slot_of in assignments(TOKENS, SLOTS).items():
        slots.copy_(slot_of)
        poison = given.clone()
        poison[slot_of < 0] = torch.nan
        x.copy_(poison)
        again()
        for p, y in enumerate(ys):
            for t, slot in enumerate(slot_of.tolist()):
                found = y[t].cpu().double()
                if slot < 0:
                    assert not found.any(), pattern
                    continue
                expected = dense[slot][p] @ given[t].double()
                off = (found - expected).abs().max()
                bound = BOUNDS[dtype] * LAUNCHES.get(name, 1)
                assert off <= bound * expected.abs().max(), (pattern, p, t)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_assignment(dtype: torch.dtype) -> None:
    shape = (ROWS[0], COLUMNS)
    forms = {v: random_slices([2, 1], shape, v, group=32) for v in range(SLOTS)}
    dense = {v: exact(form) for v, form in forms.items()}
    ids = torch.randint(0, shape[0], (TOKENS,), generator=noise(1))
    there = torch.zeros_like(ids).to(DEVICE)
    y = torch.zeros(TOKENS, COLUMNS, dtype=dtype, device=DEVICE)
    slots = torch.zeros(TOKENS, dtype=torch.int64, device=DEVICE)
    table = GroupedRows()

    def step() -> None:
        y.zero_()
        table.add(y, there, forms, make_segments(slots, SLOTS, 8), SLOTS)

    again = repeated(step)
    there.copy_(ids)
    for pattern, slot_of in assignments(TOKENS, SLOTS).items():
        slots.copy_(slot_of)
        again()
        for t, slot in enumerate(slot_of.tolist()):
            expected = torch.zeros(COLUMNS) if slot < 0 else dense[slot][ids[t]]
            off = (y[t].cpu().double() - expected).abs().max()
            assert off <= 2 * BOUNDS[dtype] * expected.abs().max(), (pattern, t)
