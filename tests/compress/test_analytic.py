"""Numbers that can be worked out on paper."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from deltafold.compress.methods import BitDelta, Dare, Svd
from deltafold.compress.terms import Context, LowRank, Planes

SHAPE = (512, 2048)


def gaussian(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3


def decode(encoded, shape):
    return encoded.term.decode(encoded.parts, shape, Context("w"))


def error(found: torch.Tensor, delta: torch.Tensor) -> float:
    return ((found - delta).norm() / delta.norm()).item()


def planes_error(bits: int) -> float:
    delta = gaussian()
    (encoded,) = BitDelta(bits=bits, scale="tensor").encode(delta, Context("w"))
    return error(decode(encoded, SHAPE), delta)


# Simulated once on other random matrices; one plane is sqrt(1 - 2/pi) on paper.
@pytest.mark.parametrize(("bits", "expected"), [(1, 0.603), (2, 0.361), (3, 0.242), (4, 0.182)])
def test_residual_planes_of_normal_deltas(bits, expected):
    assert planes_error(bits) == pytest.approx(expected, abs=0.003)


def test_one_plane_on_paper():
    assert planes_error(1) == pytest.approx(math.sqrt(1 - 2 / math.pi), abs=0.001)


@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_every_plane_lowers_the_error(scale):
    delta = gaussian((64, 256))
    errors = []
    for bits in range(1, 9):
        (encoded,) = BitDelta(bits=bits, scale=scale).encode(delta, Context("w"))
        errors.append(error(decode(encoded, (64, 256)), delta))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize(("scale", "group"), [("tensor", 0), ("row", 0), ("group", 32)])
def test_the_scale_is_the_best_in_squared_error(scale, group):
    delta = gaussian((48, 96))
    term = Planes(bits=1, scale=scale, group=group, scale_format="float32")
    encoded = term.encode(delta, Context("w"))
    best = (decode(encoded, (48, 96)) - delta).square().sum().item()
    for factor in (0.99, 1.01):
        parts = {**encoded.parts, "scales": encoded.parts["scales"] * factor}
        found = term.decode(parts, (48, 96), Context("w"))
        assert (found - delta).square().sum().item() > best


def test_the_scale_is_the_mean_magnitude():
    delta = gaussian()
    (encoded,) = BitDelta(scale="tensor").encode(delta, Context("w"))
    mean = delta.abs().mean(dtype=torch.float64).item()
    assert encoded.parts["scales"].item() == pytest.approx(mean, rel=1e-7)


def test_the_sign_of_zero_is_plus():
    delta = torch.tensor([[0.0, -0.0, -1.0, 1.0, 0.0]])
    encoded = Planes(scale="tensor", scale_format="float32").encode(delta, Context("w"))
    assert encoded.parts["signs"].tolist() == [[[0b11011]]]
    assert decode(encoded, (1, 5))[0].tolist() == pytest.approx([0.4, 0.4, -0.4, 0.4, 0.4])


def test_bytes_of_a_seven_billion_parameter_model():
    # Llama-2-7B: 32 layers of 4 attention and 3 feed-forward matrices.
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    (term,) = BitDelta(scale="tensor").plan((4096, 4096), "BF16")
    weights = signs = others = 0
    for rows, columns in layer * 32:
        parts = term.parts((rows, columns))
        weights += rows * columns
        signs += parts.pop("signs").nbytes
        others += sum(spec.nbytes for spec in parts.values())
    assert weights == 6_476_005_376
    assert signs == 809_500_672
    assert others == 32 * 7 * 4


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_dare_keeps_its_share_and_the_expected_delta(drop):
    shape = (256, 1024)
    delta = torch.ones(shape)
    (encoded,) = Dare(drop=drop, seed=11).encode(delta, Context("w"))
    found, count = decode(encoded, shape), delta.numel()
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - drop)], rel=1e-6)
    kept = (found != 0).float().mean().item()
    assert abs(kept - (1 - drop)) <= 4 * math.sqrt(drop * (1 - drop) / count)
    # The mean of n entries that are 1/(1-p) with probability 1-p has deviation sqrt(p/((1-p) n)).
    assert abs(found.mean().item() - 1) <= 4 * math.sqrt(drop / ((1 - drop) * count))


def test_dare_error_is_the_square_root_of_the_odds():
    delta = gaussian()
    (encoded,) = Dare(drop=0.9).encode(delta, Context("w"))
    assert error(decode(encoded, SHAPE), delta) == pytest.approx(3.0, abs=0.03)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_truncated_svd_misses_what_eckart_and_young_say(shape):
    delta = gaussian(shape)
    singular = torch.linalg.svdvals(delta.double())
    for rank in (1, 8, 39):
        encoded = LowRank(rank=rank, factor_format="float32").encode(delta, Context("w"))
        missed = (decode(encoded, shape).double() - delta.double()).norm().item()
        assert missed == pytest.approx(singular[rank:].norm().item(), rel=1e-4)


def test_large_matrices_go_by_way_of_their_gram_matrix(monkeypatch):
    monkeypatch.setattr("deltafold.compress.terms.lowrank._DIRECT", 16)
    for shape in ((40, 90), (90, 40)):
        delta = gaussian(shape)
        singular = torch.linalg.svdvals(delta.double())
        encoded = LowRank(rank=8, factor_format="float32").encode(delta, Context("w"))
        missed = (decode(encoded, shape).double() - delta.double()).norm().item()
        assert missed == pytest.approx(singular[8:].norm().item(), rel=1e-4)


def test_a_delta_of_low_rank_comes_back():
    draw = torch.Generator().manual_seed(4)
    delta = torch.randn(64, 3, generator=draw) @ torch.randn(3, 80, generator=draw)
    (encoded,) = Svd(rank=3).encode(delta, Context("w"))
    assert error(decode(encoded, (64, 80)), delta) < 1e-3
