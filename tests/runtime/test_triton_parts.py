"""Several layers with the same input in one launch, in outputs of their own or in one merged tensor."""

from __future__ import annotations

import sys

import pytest
import torch

from deltafold.runtime.kernels.base import DeltaMatrix, Scaled, Sum
from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.kernels.simple import Factors

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from slices import (
    BOUNDS,
    DEVICE,
    DTYPES,
    exact,
    noise,
    random_factors,
    random_kind,
    random_slice,
    random_slices,
    random_sparse,
)

from deltafold.runtime.kernels.triton import launch
from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.grouped import GroupedProducts
from deltafold.runtime.kernels.triton.launch import add_slices
from deltafold.runtime.kernels.triton.layout import Kind, Slice, values
from deltafold.runtime.kernels.triton.segments import make_segments
from deltafold.runtime.kernels.triton.table import make_table

COLUMNS = 150
#: Rows of each part; blocks have 128.
ROWS = (140, 129, 300)
#: Slots of the tokens of one batch.
SLOTS = torch.tensor([1, -1, 0, 2, 1, 0, 2])


def sliced(kind: Kind, seed: int) -> tuple[list[tuple[Slice, float]], torch.Tensor]:
    """One slice with a weight, and what it stands for."""
    piece = random_slice(kind, seed)
    return [(piece, 0.5)], values(piece).cpu().double() * 0.5


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_add_to_their_own_outputs(merged: bool, splits: int, dtype: torch.dtype) -> None:
    """The second slot has nothing in the second part; the third one's first part has fewer rows."""
    kinds = [random_kind(1, rows, COLUMNS, half=True) for rows in ROWS]
    by_part, dense = [], []
    for p, kind in enumerate(kinds):
        made = [sliced(kind, 10 * p + v) for v in range(3)]
        if p == 0:
            made[2] = sliced(random_kind(1, 129, COLUMNS, half=True), 7)
        if p == 1:
            made[1] = [], torch.zeros(129, COLUMNS, dtype=torch.float64)
        by_part.append([pieces for pieces, _ in made])
        dense.append([whole for _, whole in made])
    table = make_table(kinds[0].of_blocks, by_part, DEVICE)
    x = torch.randn(len(SLOTS), COLUMNS, generator=noise(0)).to(dtype)
    x[SLOTS < 0] = torch.nan
    # One tensor with columns before, between and behind the parts that nobody may touch.
    whole = torch.full((len(SLOTS), sum(ROWS) + 40), 3.0, dtype=dtype, device=DEVICE)
    places = [8, 8 + ROWS[0] + 8, 24 + ROWS[0] + ROWS[1]]
    ys = [whole[:, at : at + rows] for at, rows in zip(places, ROWS, strict=True)]
    if not merged:
        ys = [y.contiguous() for y in ys]
    segments = make_segments(SLOTS.to(DEVICE), 3, 8)
    add_slices(ys, x.to(DEVICE), table, segments, splits)
    for p, y in enumerate(ys):
        for t, slot in enumerate(SLOTS.tolist()):
            expected = torch.full((ROWS[p],), 3.0, dtype=torch.float64)
            if slot >= 0:
                added = dense[p][slot] @ x[t].double()
                expected[: len(added)] += added
            off = (y[t].cpu().double() - expected).abs().max()
            assert off <= BOUNDS[dtype] * expected.abs().max(), (p, t)
            assert slot >= 0 or off == 0
    if merged:
        touched = torch.zeros(whole.shape[1], dtype=torch.bool)
        for at, rows in zip(places, ROWS, strict=True):
            touched[at : at + rows] = True
        assert bool((whole[:, ~touched] == 3).all())


@pytest.mark.parametrize("cut", [1, 2])
def test_codecs_of_all_kinds_share_a_group(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slot and part has other forms, so each launch has other parts."""
    monkeypatch.setattr(launch, "splits_for", lambda *_: cut)
    monkeypatch.setattr(
        "deltafold.runtime.kernels.triton.lowrank.splits_for", lambda *_: 1 if cut == 1 else 3
    )
    rows, columns, tokens = (40, 40, 17, 24), 70, len(SLOTS)

    def slices(p: int, bits: int) -> BitSlices:
        return random_slices([bits, 1], (rows[p], columns), p)

    def factors(p: int, rank: int) -> Factors:
        return random_factors(rank, (rows[p], columns), p + rank)

    def dense(p: int) -> Dense:
        return Dense(torch.randn(rows[p], columns, generator=noise(p)).to(DEVICE))

    sparse = [random_sparse(v)[0] for v in range(3)]
    forms: dict[int, list[DeltaMatrix | None]] = {
        0: [sparse[0], dense(1), factors(2, 3), slices(3, 2)],
        1: [slices(0, 4), Sum([Scaled(sparse[1], 2.0), factors(1, 20)]), slices(2, 2), None],
        2: [None, sparse[2], Sum([slices(2, 4), Scaled(dense(2), -0.5), dense(2)]), factors(3, 7)],
    }
    x = torch.randn(tokens, columns, generator=noise(9)).to(DEVICE)
    ys = [torch.zeros(tokens, n, device=DEVICE) for n in rows]
    scales = torch.rand(tokens, generator=noise(4)).to(DEVICE)
    segments = make_segments(SLOTS.to(DEVICE), 3, 8, scales)
    GroupedProducts(4).add(ys, x, forms, segments, 3)
    for p, y in enumerate(ys):
        for t, slot in enumerate(SLOTS.tolist()):
            form = forms[slot][p] if slot >= 0 else None
            expected = torch.zeros(rows[p], dtype=torch.float64)
            if form is not None:
                expected = exact(form) @ x[t].cpu().double() * scales[t].cpu().double()
            assert torch.allclose(y[t].cpu().double(), expected, rtol=1e-5, atol=1e-5), (p, t)


#: Ranks of each part and slot: blocks of 64 ranks, and one more, none, and one that fills a few.
RANKS = ((65, 3, 300), (130, 0, 16), (1, 64, 129))


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_of_any_size(dtype: torch.dtype, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """High ranks take several steps; whoever has a low one beside them gets its own."""
    monkeypatch.setattr("deltafold.runtime.kernels.triton.lowrank.splits_for", lambda *_: cut)
    rows, columns = (40, 130, 17), 260
    forms: dict[int, list[DeltaMatrix | None]] = {
        v: [
            random_factors(RANKS[p][v], (n, columns), 10 * p + v, dtype) if RANKS[p][v] else None
            for p, n in enumerate(rows)
        ]
        for v in range(3)
    }
    forms[0][2] = Sum([random_factors(r, (17, columns), r, dtype) for r in (1, 70)])
    x = torch.randn(len(SLOTS), columns, generator=noise(3)).to(dtype)
    x[SLOTS < 0] = torch.nan
    # Columns between and behind the parts belong to nobody.
    whole = torch.full((len(SLOTS), sum(rows) + 24), 3.0, dtype=dtype, device=DEVICE)
    places = [8, 8 + rows[0], 16 + rows[0] + rows[1]]
    ys = [whole[:, at : at + n] for at, n in zip(places, rows, strict=True)]
    GroupedProducts(3).add(ys, x.to(DEVICE), forms, make_segments(SLOTS.to(DEVICE), 3, 8), 3)
    for p, y in enumerate(ys):
        for t, slot in enumerate(SLOTS.tolist()):
            expected = torch.full((rows[p],), 3.0, dtype=torch.float64)
            form = forms[slot][p] if slot >= 0 else None
            if form is not None:
                expected += exact(form) @ x[t].double()
            off = (y[t].cpu().double() - expected).abs().max()
            assert off <= BOUNDS[dtype] * expected.abs().max(), (p, t)
            assert slot >= 0 or off == 0
    touched = torch.zeros(whole.shape[1], dtype=torch.bool)
    for at, n in zip(places, rows, strict=True):
        touched[at : at + n] = True
    assert bool((whole[:, ~touched] == 3).all())
