"""The inner loops in C and their portable twins: the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from deltafold.compress import fast, fast_grid, fast_planes
from deltafold.compress.bits import pack
from deltafold.compress.fast import Pair

SHAPES = [
    (1, 1),
    (3, 7),
    (5, 16),
    (4, 33),
    (2, 130),
    (9, 640),
    (3, 4096),
    (2, 8230),
    (0, 4),
    (4, 0),
]
WIDTHS = [1, 5, 8, 16, 32, 64, 1000]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_c = pytest.mark.skipif(fast.fast_library() is None, reason="needs AVX2 and a C compiler")


@pytest.fixture
def portable(monkeypatch):
    def without(function, *args):
        with monkeypatch.context() as m:
            m.setattr(fast, "fast_library", lambda: None)
            m.setattr(fast_planes, "planes_library", lambda: None)
            m.setattr(fast_grid, "grid_library", lambda: None)
            return function(*args)

    return without


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(shape, first=torch.bfloat16, second=torch.bfloat16, step=0.01) -> Pair:
    """Two models, of which a fifth of the entries are equal."""
    base = noise(shape).to(second)
    change = noise(shape, 1) * step
    change[noise(shape, 2) > 0.8] = 0
    return Pair.of((base.float() + change).to(first), base)


@needs_c
@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_differences_are_torch_s(first, second, portable):
    variant, base = noise((13, 21)).to(first), noise((13, 21), 1).to(second)
    expected = variant.float() - base.float()
    assert torch.equal(fast.difference(variant, base), expected)
    assert torch.equal(portable(fast.difference, variant, base), expected)
    assert torch.equal(fast.difference(variant, None), variant.float())


@needs_c
def test_differences_of_every_half_precision_pattern():
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype)
        found, expected = fast.difference(values, None), values.float() - 0
        same = (found == expected) | (found.isnan() & expected.isnan())
        assert bool(same.all())


@needs_c
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("first", "second"), [(DTYPES[2], DTYPES[2]), (DTYPES[1], DTYPES[0])], ids=str
)
def test_planes_have_the_same_bits(shape, width, first, second, portable):
    models = pair(shape, first, second)
    rows, columns = shape
    width = min(width, columns) or 1
    delta = models.delta()
    ours, theirs = (torch.zeros(3, rows, -(-columns // 8), dtype=torch.uint8) for _ in range(2))
    for one in (False, True):
        levels = torch.empty(0)
        for plane in range(3):
            sums = fast_planes.take_plane(models, width, levels, ours)
            again = portable(fast_planes.take_plane, models, width, levels, theirs)
            assert torch.equal(sums, again)
            assert torch.equal(ours[: plane + 1], theirs[: plane + 1])
            level = torch.tensor(0.004) if one else sums / width
            levels = torch.cat([levels.reshape(plane, *level.shape), level.unsqueeze(0)])
        assert torch.equal(ours[0], pack((delta >= 0).to(torch.uint8), 1))
        found = fast_planes.planes_missed(models, width, levels, ours)
        assert found == portable(fast_planes.planes_missed, models, width, levels, theirs)
        total, other = torch.zeros(shape), torch.zeros(shape)
        for signs, level in zip(ours, levels, strict=True):
            fast_planes.add_plane(total, signs, level, width)
            portable(fast_planes.add_plane, other, signs, level, width)
        assert torch.equal(total, other)
        true = (delta.double() - total.double()).square().sum().item()
        assert found == pytest.approx(true, rel=1e-4)


@needs_c
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_have_the_same_bits(shape, width, bits, portable):
    models = pair(shape, step=0.1)
    rows, columns = shape
    width, half = min(width, columns) or 1, 2 ** (bits - 1)
    shares = [-share / half for share in (1.0, 0.95, 0.9, 0.6)]
    scales = fast_grid.best_scales(models, width, bits, shares)
    again = portable(fast_grid.best_scales, models, width, bits, shares)
    assert bits_of(scales) == bits_of(again)
    assert scales.shape == (rows, -(-columns // width))
    if rows:
        scales[0] = 0
    codes = fast_grid.codes(models, width, bits, scales)
    assert torch.equal(codes, portable(fast_grid.codes, models, width, bits, scales))
    values = fast_grid.values(codes, columns, width, bits, scales)
    assert torch.equal(values, portable(fast_grid.values, codes, columns, width, bits, scales))
    found = fast_grid.codes_missed(models, width, bits, scales, codes)
    arguments = (models, width, bits, scales, codes)
    assert found == portable(fast_grid.codes_missed, *arguments)
    true = (models.delta().double() - values.double()).square().sum().item()
    assert found == pytest.approx(true, rel=1e-4)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


@needs_c
def test_the_first_of_equal_peaks_gives_its_sign(portable):
    for entries in ([0.5, -0.5] * 20, [-0.5, 0.5] * 20, [0.0, -0.0] * 20, [-0.0, 0.0] * 20):
        matrix = Pair.of(torch.tensor([entries[:37]]))
        arguments = (matrix, 37, 4, [-0.125])
        found = fast_grid.best_scales(*arguments)
        assert bits_of(found) == bits_of(portable(fast_grid.best_scales, *arguments))
        assert found.item() == -entries[0] / 8


@needs_c
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_totals_are_the_same_and_right(shape, first, second, portable):
    models = pair(shape, first, second)
    found, delta = fast.totals(models), models.delta().double()
    assert found == portable(fast.totals, models)
    assert found.changed == int((delta != 0).sum())
    assert found.largest == (delta.abs().max().item() if delta.numel() else 0)
    assert models.base is not None
    right = [delta.abs().sum(), delta.square().sum(), models.base.double().square().sum()]
    sums = (found.magnitude, found.square, found.base_square)
    assert sums == pytest.approx([t.item() for t in right], rel=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e30])
def test_squares_beyond_float32_are_summed_too(size, portable):
    models = Pair.of(noise((40, 64)) * size)
    right = models.variant.double().square().sum().item()
    assert fast.totals(models).square == pytest.approx(right, rel=1e-9)
    assert portable(fast.totals, models).square == pytest.approx(right, rel=1e-9)


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_differ_by_any_bit(dtype, portable):
    first = noise((9, 5)).to(dtype)
    first[2, 1] = 0.0
    second = first.clone()
    second[2, 1] = -0.0
    second[8, 4] += 1
    for found in (fast.rows_changed(first, second), portable(fast.rows_changed, first, second)):
        assert found.nonzero().flatten().tolist() == [2, 8]
    assert fast.rows_changed(first[:0], second[:0]).shape == (0,)
