"""The GPU kernels against float64, in Triton's interpreter where there is no GPU (see conftest)."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from deltafold.runtime.kernels.base import Scaled, Sum
from deltafold.runtime.kernels.simple import Factors

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from slices import (
    DEVICE,
    assignments,
    noise,
    random_kind,
    random_slice,
    random_sparse,
)

from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.grouped import GroupedProducts
from deltafold.runtime.kernels.triton.launch import add_slices
from deltafold.runtime.kernels.triton.layout import values
from deltafold.runtime.kernels.triton.segments import TILE_TOKENS, make_segments
from deltafold.runtime.kernels.triton.sparse import add_sparse, make_sparse_table
from deltafold.runtime.kernels.triton.table import make_table


@pytest.mark.parametrize("tokens", [1, 7, 64, 200])
@pytest.mark.parametrize("slots", [1, 3, 64])
@pytest.mark.parametrize("block", TILE_TOKENS)
def test_segments_hold_each_token_once_with_its_slot(tokens: int, slots: int, block: int) -> None:
    for name, given in assignments(tokens, slots).items():
        made = make_segments(given.to(DEVICE), slots, block)
        seen = {}
        for slot, start, length in zip(
            made.slot.tolist(), made.start.tolist(), made.length.tolist(), strict=True
        ):
            assert 0 <= length <= block, name
            for token in made.order[start : start + length].tolist():
                assert token not in seen, name
                seen[token] = slot
        assert seen == {i: s for i, s in enumerate(given.tolist()) if s >= 0}, name
        assert int(made.begin) == int((given < 0).sum()), name


@pytest.mark.parametrize("pattern", list(assignments(1, 1)))
@pytest.mark.parametrize("splits", [1, 3])
def test_each_token_gets_its_own_variants_slices(pattern: str, splits: int) -> None:
    """Variants with 0 to 2 slices each; what belongs to no variant is poison."""
    kind, slots, tokens = random_kind(4, 20, 150, half=True), 3, 9
    slices = [[(random_slice(kind, 7 * v + i), 1.0 + i) for i in range(v)] for v in range(slots)]
    dense = [
        torch.zeros(20, 150) + sum(values(piece).cpu() * w for piece, w in each) for each in slices
    ]
    given = assignments(tokens, slots)[pattern]
    x = torch.randn(tokens, 150, generator=noise(1))
    y = torch.randn(tokens, 20, generator=noise(2))
    x[given < 0], y[given < 0] = torch.nan, 7.0
    scales = torch.rand(tokens, generator=noise(3))
    expected = y.to(torch.float64)
    for i, slot in enumerate(given.tolist()):
        if slot >= 0:
            expected[i] += scales[i] * (x[i].double() @ dense[slot].double().T)
    # Rows lie within a wider tensor, whose other columns nobody may touch.
    wide = torch.full((tokens, 24), 3.25).to(DEVICE)
    wide[:, :20] = y.to(DEVICE)
    table = make_table(kind.of_blocks, [slices], DEVICE)
    segments = make_segments(given.to(DEVICE), slots, 8, scales.to(DEVICE))
    add_slices([wide[:, :20]], x.to(DEVICE), table, segments, splits)
    assert torch.allclose(wide[:, :20].cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert bool((wide[:, 20:] == 3.25).all())
    assert torch.equal(wide[:, :20].cpu()[given < 0], y[given < 0])


def test_sixty_four_variants_with_one_token_each() -> None:
    kind = random_kind(1, 16, 40)
    slices = [[(random_slice(kind, v), 1.0)] for v in range(64)]
    x = torch.randn(64, 40, generator=noise(0)).to(DEVICE)
    y = torch.zeros(64, 16, device=DEVICE)
    order = torch.randperm(64, generator=noise(1)).to(DEVICE)
    table = make_table(kind.of_blocks, [slices], DEVICE)
    add_slices([y], x, table, make_segments(order, 64, 8))
    for i, slot in enumerate(order.tolist()):
        expected = values(slices[slot][0][0]).double() @ x[i].double()
        assert torch.allclose(y[i].double(), expected, rtol=1e-5, atol=1e-6)


def test_outliers_of_one_token_reach_no_other() -> None:
    kind = random_kind(1, 16, 600, group=64)
    piece = random_slice(kind, 0)
    table = make_table(kind.of_blocks, [[[(piece, 1.0)]]], DEVICE)
    x = torch.randn(5, 600, generator=noise(4)).to(DEVICE)
    segments = make_segments(torch.zeros(5, dtype=torch.int64, device=DEVICE), 1, 8)
    plain, wild = torch.zeros(5, 16, device=DEVICE), torch.zeros(5, 16, device=DEVICE)
    add_slices([plain], x, table, segments)
    x[3, 17], x[2] = 1e5, 1e30
    add_slices([wild], x, table, segments)
    others = [0, 1, 4]
    assert torch.equal(plain[others], wild[others])
    exact = values(piece).double() @ x[3].double()
    assert (wild[3].double() - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("tokens", [1, 40])
def test_sparse_rows_of_several_variants(tokens: int) -> None:
    made = [random_sparse(v) for v in range(3)]
    table = make_sparse_table([[[(f, 0.5)] for f, _ in made]], DEVICE)
    given = assignments(tokens, 3)["in turn"]
    x = torch.randn(tokens, 70, generator=noise(5))
    x[given < 0] = torch.nan
    y = torch.ones(tokens, 40)
    expected = y.double()
    for i, slot in enumerate(given.tolist()):
        if slot >= 0:
            expected[i] += 0.5 * (made[slot][1].double() @ x[i].double())
    out = y.to(DEVICE)
    add_sparse([out], x.to(DEVICE), table, make_segments(given.to(DEVICE), 3, 16))
    assert torch.allclose(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_whose_variants_come_and_go() -> None:
    """Slots change hands; what the variant before left there is never applied."""
    shape, tokens = (24, 48), 4
    layer = GroupedProducts()
    x = torch.randn(tokens, shape[1], generator=noise(0)).to(DEVICE)
    segments = make_segments(torch.tensor([0, 1, 1, -1], device=DEVICE), 4, 8)
    slices = BitSlices(
        (random_slice(random_kind(1, *shape), 1), random_slice(random_kind(4, *shape), 2))
    )
    factors = Factors(torch.randn(5, 48).to(DEVICE), torch.randn(24, 5).to(DEVICE))
    sparse = random_slice(random_kind(2, *shape), 3)
    other = BitSlices((sparse,))
    mixed = Sum([Scaled(slices, 0.5), Scaled(factors, 2.0), slices])

    def check(forms: dict[int, object]) -> None:
        y = torch.zeros(tokens, shape[0], device=DEVICE)
        layer.add([y], x, {s: (f,) for s, f in forms.items()}, segments, 4)  # type: ignore[misc]
        for token, slot in enumerate([0, 1, 1]):
            form = forms[slot]
            expected = torch.zeros(shape[0], device=DEVICE)
            if form is not None:
                expected = form.matmul(x[token : token + 1])[0]  # type: ignore[attr-defined]
            assert torch.allclose(y[token], expected, rtol=1e-4, atol=1e-4), (token, form)
        assert not y[3].any()

    check({0: slices, 1: mixed})
    check({0: None, 1: mixed})
    check({0: factors, 1: slices})
    check({0: other, 1: None})
    del other
    gc.collect()
    # The dropped variant's memory is gone; its slot is used by one that leaves this layer alone.
    check({0: None, 1: factors})
