"""The inner loops in C and their portable twins: the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from deltafold.compress import fast
from deltafold.compress.bits import pack

SHAPES = [(1, 1), (3, 7), (5, 16), (4, 33), (2, 130), (9, 640), (0, 4), (4, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_c = pytest.mark.skipif(fast.fast_library() is None, reason="needs AVX2 and a C compiler")


@pytest.fixture
def portable(monkeypatch):
    def without(function, *args):
        with monkeypatch.context() as m:
            m.setattr(fast, "fast_library", lambda: None)
            return function(*args)

    return without


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
@pytest.mark.parametrize("width", [1, 5, 16, 64, 1000])
def test_sums_and_planes_have_the_same_bits(shape, width, portable):
    matrix = noise(shape) * 1e-3
    sums = fast.magnitude_sums(matrix, width)
    assert torch.equal(sums, portable(fast.magnitude_sums, matrix, width))
    groups = -(-shape[1] // width)
    assert sums.shape == (shape[0], groups)
    whole = torch.nn.functional.pad(matrix.abs().double(), (0, groups * width - shape[1]))
    true = whole.reshape(shape[0], groups, width).sum(-1)
    assert torch.allclose(sums.double(), true, rtol=1e-5, atol=1e-12)
    for levels in (sums / width, torch.tensor([0.01])):
        ours, theirs = matrix.clone(), matrix.clone()
        signs = fast.take_plane(ours, levels, width)
        assert torch.equal(signs, portable(fast.take_plane, theirs, levels, width))
        assert torch.equal(ours, theirs)
        assert torch.equal(signs, pack((matrix >= 0).to(torch.uint8), 1))
        fast.add_plane(ours, signs, levels, width)
        portable(fast.add_plane, theirs, signs, levels, width)
        assert torch.equal(ours, theirs)
        assert torch.allclose(ours, matrix, atol=1e-6)


@needs_c
@pytest.mark.parametrize("count", [0, 1, 15, 4097, 50001])
def test_totals_are_right(count, portable):
    d, r = noise((count,)), noise((count,), 2) * 0.1
    d[::7] = 0
    found, expected = fast.totals(d, r), portable(fast.totals, d, r)
    assert found.changed == expected.changed
    assert found.largest == expected.largest
    assert found[:3] == pytest.approx(expected[:3], rel=1e-5)
    assert fast.totals(d).rest == 0


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


@needs_c
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 16, 1000])
def test_what_planes_miss(shape, width, portable):
    delta, rows, columns = noise(shape), *shape
    groups = -(-columns // width)
    signs = torch.stack([pack((noise(shape, s) >= 0).to(torch.uint8), 1) for s in (1, 2)])
    for levels in (torch.rand(2, rows, groups), torch.rand(2)):
        total = torch.zeros(shape)
        for plane, level in zip(signs, levels, strict=True):
            fast.add_plane(total, plane, level, width)
        expected = (delta - total).double().square().sum().item()
        arguments = (delta, signs, levels, width)
        assert fast.planes_error(*arguments) == pytest.approx(expected, rel=1e-5)
        assert portable(fast.planes_error, *arguments) == pytest.approx(expected, rel=1e-5)
    for dtype in DTYPES:
        exact = delta.to(dtype).double().square().sum().item()
        assert fast.square_sum(delta.to(dtype)) == pytest.approx(exact, rel=1e-5)


def test_scratch_memory_is_lent_again():
    first = fast.scratch("test", (4, 5)).fill_(1)
    again = fast.scratch("test", (2, 3))
    assert again.data_ptr() == first.data_ptr()
    assert fast.scratch("other", (4, 5)).data_ptr() != first.data_ptr()
    assert fast.scratch("test", (0, 7)).shape == (0, 7)
    fast.forget()
