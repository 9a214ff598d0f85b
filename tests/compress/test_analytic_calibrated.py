"""Codecs that look at a layer's inputs: what they gain at its outputs, and their sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltafold.compress import parse_spec
from deltafold.compress.evidence import Evidence
from deltafold.compress.methods.axis_signs import scale_inputs, scale_outputs
from deltafold.compress.methods.deltazip import prune_and_round
from deltafold.compress.methods.feedback import code_with_feedback
from deltafold.compress.methods.svd_widths import _WIDTHS as WIDTHS
from deltafold.compress.methods.svd_widths import allot
from deltafold.compress.terms import NM, Banded, ColumnPlanes, Context, Planes
from deltafold.compress.terms.grids import Grid

N, M = 24, 40


def moments(columns: int = M, seed: int = 0) -> torch.Tensor:
    """Second moments of inputs that go together, as those of real layers do."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=draw) * torch.linspace(0.1, 2, columns)
    x = torch.randn(300, columns // 4, generator=draw) @ mixed[: columns // 4]
    x = x + 0.1 * torch.randn(300, columns, generator=draw)
    return x.T @ x / 300


def delta(rows: int = N, columns: int = M) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    low = torch.randn(rows, 6, generator=draw) @ torch.randn(6, columns, generator=draw)
    return 0.01 * (low + torch.randn(rows, columns, generator=draw))


def lost(error: torch.Tensor, moment: torch.Tensor) -> float:
    """`tr(E H E^T)`: the mean squared error of the layer's outputs."""
    return torch.trace(error.double() @ moment.double() @ error.double().T).item()


def decoded(spec: str, value: torch.Tensor, context: Context) -> torch.Tensor:
    shape = tuple(value.shape)
    encoded = parse_spec(spec).encode(value, context)
    return sum(t.decode(p, shape, replace(context, evidence=None)) for t, p in encoded)


GAINS = [
    ("svd-act:rank=5", "svd:rank=5", 0.8),
    ("int-hessian:bits=2", "int:bits=2", 0.6),
    ("int-hessian:bits=4,group=16", "int:bits=4,group=16", 0.6),
    ("deltazip:bits=4", None, 0.6),
    ("axis-signs", None, 0.95),
    ("delta-come:bits=6,group=16", None, 0.9),
    ("delta-come:bits=6,group=16,ordered=false", None, 0.9),
    ("svd-widths:bits=2,group=16", "delta-come:bits=2,group=16", 0.9),
]


@pytest.mark.parametrize(("spec", "plain", "gain"), GAINS, ids=[g[0] for g in GAINS])
def test_outputs_lose_less_than_without_calibration(spec, plain, gain):
    value, moment = delta(), moments()
    blind = Context("w")
    seeing = replace(blind, evidence=Evidence(second_moment=moment))
    found = lost(decoded(spec, value, seeing) - value, moment)
    without = lost(decoded(plain or spec, value, blind) - value, moment)
    assert found < gain * without
    if plain:
        assert torch.equal(decoded(spec, value, blind), decoded(plain, value, blind))


@pytest.mark.parametrize("spec", ["svd-act:rank=5", "delta-come:bits=6,group=16"])
def test_layers_that_multiply_from_the_other_side_are_turned(spec):
    value, moment = delta(), moments()
    seeing = Context("w", evidence=Evidence(second_moment=moment))
    turned = Context("w", evidence=Evidence(row_moment=moment))
    found = lost(decoded(spec, value.T.contiguous(), turned).T - value, moment)
    assert found == pytest.approx(lost(decoded(spec, value, seeing) - value, moment), rel=0.1)


def made_of_signs(axis: int) -> torch.Tensor:
    """A delta that is signs times a scale for each row (0) or column (1)."""
    draw = torch.Generator().manual_seed(2)
    signs = torch.where(torch.rand(N, M, generator=draw) < 0.5, -1.0, 1.0)
    sizes = torch.rand(N if axis == 0 else M, generator=draw) + 0.1
    return signs * (sizes.unsqueeze(1) if axis == 0 else sizes)


@pytest.mark.parametrize(("axis", "term"), [(0, Planes), (1, ColumnPlanes)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_axis_that_fits_is_found(axis, term, turned):
    value = made_of_signs(axis)
    known = {"row_moment": moments(N)} if turned else {"second_moment": moments()}
    context = Context("w", evidence=Evidence(**known))
    (encoded,) = parse_spec("axis-signs").encode(value, context)
    assert isinstance(encoded.term, term)
    found = encoded.term.decode(encoded.parts, (N, M), Context("w"))
    torch.testing.assert_close(found, value, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("best", [scale_outputs, scale_inputs])
def test_scales_are_the_least_squares_optimum(best):
    value, hessian = delta().double(), moments().double()
    signs = torch.where(value >= 0, 1.0, -1.0).double()
    sizes = best(value, signs, hessian)
    least = None
    for change in (0.0, 0.01, -0.01):
        moved = sizes.clone()
        moved[3] *= 1 + change
        error = value - signs * (moved.unsqueeze(1) if best is scale_outputs else moved)
        loss = lost(error, hessian)
        least = loss if least is None else least
        assert loss >= least


def test_whitening_is_the_best_of_its_rank():
    # In the inputs' metric the loss is what the cut-off singular values of D L say.
    value, moment = delta(), moments()
    context = Context("w", evidence=Evidence(second_moment=moment))
    found = lost(decoded("svd-act:rank=5,damp=1e-6", value, context) - value, moment)
    lower = torch.linalg.cholesky(moment.double())
    singular = torch.linalg.svdvals(value.double() @ lower)
    assert found == pytest.approx(singular[5:].square().sum().item(), rel=1e-2)


def test_without_correlations_feedback_changes_nothing():
    # Steps in float32: in float16 those of one group and of all are rounded by different units.
    value, grid = delta(), Grid(4, 16, scale_format="float32")
    for ordered in (False, True):
        coded = code_with_feedback(value, torch.eye(M), grid, ordered=ordered)
        plain = grid.code(value)
        assert torch.equal(coded.codes, plain.codes)
        assert torch.equal(coded.scales.zero, plain.scales.zero)
        assert torch.equal(coded.scales.step, plain.scales.step)


def test_four_columns_lose_the_two_entries_that_cost_least():
    # Uncorrelated inputs of unequal size: what counts is |w| times the input's, and nothing is mended.
    value = torch.tensor([[1.0, 2.0, 3.0, -4.0, 5.0, 0.0]])
    moment = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    places, coded = prune_and_round(value, moment, NM(bits=4).grid, 1e-9)
    assert places.tolist() == [[0, 3, 0, 1]]
    # Steps of 2 * 5 / 15, halves rounded to even: 1.5 -> 2, -6, 7.5 -> 7 (the highest level), 0.
    assert coded.codes.tolist() == [[8 + 2, 8 - 6, 8 + 7, 8]]
    assert coded.scales.step.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_size_of_2_of_4_codes(bits):
    (term,) = parse_spec(f"deltazip:bits={bits}").plan((4096, 4096), "BF16")
    size = 8 * sum(part.nbytes for part in term.parts((4096, 4096)).values())
    assert size / 4096**2 == pytest.approx(bits / 2 + 1, abs=0.01)


def test_every_bit_goes_where_it_saves_most():
    # Errors that shrink fourfold a bit: the dynamic program over all allotments can be written out.
    draw = torch.Generator().manual_seed(0)
    widths = torch.tensor(WIDTHS)
    errors = torch.rand(6, 1, generator=draw).double() ** 4 * 4.0 ** -widths.double()
    best = {0: 0.0}
    for row in errors.tolist():
        grown: dict[int, float] = {}
        for used, loss in best.items():
            for width, error in zip(WIDTHS, row, strict=True):
                key = used + width
                grown[key] = min(grown.get(key, torch.inf), loss + error)
        best = grown
    for budget in (0, 5, 12, 24, 60):
        found = allot(errors, budget)
        used = int(found.sum())
        assert used <= budget
        loss = sum(errors[i, WIDTHS.index(w)].item() for i, w in enumerate(found.tolist()))
        # The best that there is for as many bits as were used.
        assert loss == pytest.approx(min(v for k, v in best.items() if k <= used))
        assert min(budget, 6 * 8) - used < 6


def code_bits(term: Banded, shape: tuple[int, int]) -> float:
    parts = term.parts(shape).items()
    return 8 * sum(p.nbytes for key, p in parts if key.endswith("codes")) / (shape[0] * shape[1])


def test_the_published_bands_of_a_7b_model():
    (term,) = parse_spec("delta-come").plan((4096, 4096), "BF16")
    assert term.ranks == (2, 32, 968)
    assert code_bits(term, (4096, 4096)) == 1.0
    mlp = Banded(ranks=(2, 32, 1428), widths=(8, 3, 2))
    assert code_bits(mlp, (11008, 4096)) == pytest.approx(0.9942, abs=1e-4)
