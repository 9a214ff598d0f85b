"""Edits against numbers that can be worked out on paper."""

from __future__ import annotations

import math

import pytest
import torch

from deltafold.compress import DeltafoldError, parse_spec
from deltafold.compress.edits import (
    DareEdit,
    DareK,
    DareKGradient,
    DarexQ,
    Della,
    Irr,
    SafeDelta,
    SampledMagnitudes,
    Stratified,
    Trim,
)
from deltafold.compress.edits.darex_q import divisor
from deltafold.compress.evidence import Evidence
from deltafold.compress.obs import damped, inverse_cholesky
from deltafold.compress.terms import Context
from deltafold.compress.threshold import magnitude_thresholds, tensor_threshold

SHAPE = (256, 1024)
ONES = torch.ones(SHAPE)
W = Context("w")


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moments(columns: int, seed: int = 0) -> torch.Tensor:
    x = gaussian(4 * columns, columns, seed) @ gaussian(columns, columns, seed + 1)
    return x.T @ x / len(x)


@pytest.mark.parametrize(("k", "p"), [(0.0, 0.9), (0.5, 0.3), (-1.0, 0.3), (0.8, 0.6)])
def test_two_multipliers_have_mean_one_and_the_stated_variance(k, p):
    found = DareK(k=k, p=p, seed=4).apply(ONES, W).double()
    deviation = abs(1 - k) * math.sqrt(p / (1 - p))
    assert found.unique().tolist() == pytest.approx(sorted([k, (1 - k * p) / (1 - p)]), rel=1e-6)
    assert abs(found.mean().item() - 1) <= 4 * deviation / math.sqrt(found.numel())
    assert found.var().item() == pytest.approx(deviation**2, rel=0.02)


def test_k_zero_is_dare_and_k_one_is_nothing():
    delta = gaussian(33, 70)
    assert torch.equal(DareK(k=1.0, p=0.3).apply(delta, W), delta)
    plain = DareEdit(drop=0.7, seed=5).apply(delta, W)
    torch.testing.assert_close(DareK(k=0.0, p=0.7, seed=5).apply(delta, W), plain)
    assert torch.equal(DareK(k=0.0, p=0.7, seed=5).apply(delta, W) == 0, plain == 0)


@pytest.mark.parametrize("draw", ["normal", "uniform"])
@pytest.mark.parametrize("spread", [0.0, 0.3, 0.9])
def test_drawn_magnitudes_have_the_mean_of_the_deltas_and_the_spread_asked_for(draw, spread):
    delta = gaussian(*SHAPE)
    found = SampledMagnitudes(draw, spread, seed=3).apply(delta, W)
    magnitudes = (found * delta.sign()).double()
    mean = delta.abs().double().mean().item()
    assert magnitudes.mean().item() == pytest.approx(mean, rel=6e-3)
    assert magnitudes.std().item() == pytest.approx(spread * mean, rel=1e-2, abs=1e-6)
    # Draws that know nothing of the delta: their variance comes on top of BitDelta's error.
    expected = math.sqrt(spread**2 * 2 / math.pi + 1 - 2 / math.pi)
    assert ((found - delta).norm() / delta.norm()).item() == pytest.approx(expected, rel=5e-3)
    if draw == "uniform":
        width = math.sqrt(3) * spread * mean
        assert magnitudes.min() >= (mean - width) - 1e-6
        assert magnitudes.max() <= (mean + width) + 1e-6


def test_magnitudes_without_spread_are_bitdeltas():
    delta = gaussian(33, 70)
    ((term, parts),) = parse_spec("bitdelta:scale=tensor").encode(delta, W)
    found = SampledMagnitudes(spread=0).apply(delta, W)
    torch.testing.assert_close(found, term.decode(parts, (33, 70), W), rtol=1e-6, atol=0)


def test_the_edit_drops_what_the_codec_drops():
    delta = gaussian(16, 64) * 1e-3
    ((term, parts),) = parse_spec("dare:drop=0.8,seed=2").encode(delta, W)
    coded = term.decode(parts, (16, 64), W)
    torch.testing.assert_close(DareEdit(drop=0.8, seed=2).apply(delta, W), coded, rtol=1e-3, atol=0)


def test_a_larger_divisor_shrinks_what_is_kept():
    found = DareEdit(drop=0.75, divisor=0.5).apply(ONES, W)
    assert found.unique().tolist() == [0.0, 2.0]


def test_signs_are_split_so_that_the_mean_multiplier_is_one():
    delta = gaussian(20, 50)
    share = (delta < 0).double().mean().item()
    found = DareK(k=0.5, mask="sign").apply(delta, W) / delta
    assert torch.allclose(found[delta < 0], torch.tensor(0.5))
    assert torch.allclose(found[delta > 0], torch.tensor((1 - 0.5 * share) / (1 - share)))
    assert found.mean().item() == pytest.approx(1, abs=1e-5)
    both = DareK(k=0.5, mask="sign", other=3.0).apply(delta, W) / delta
    assert torch.allclose(both[delta > 0], torch.tensor(3.0))


def test_products_with_the_gradient_are_split_by_their_sign():
    delta, gradient = gaussian(8, 9), gaussian(8, 9, seed=1)
    context = Context("w", evidence=Evidence(gradient=gradient))
    found = DareKGradient(k=0.0, other=1.0).apply(delta, context)
    assert torch.equal(found != 0, delta * gradient >= 0)


def test_the_gradients_split_keeps_the_mean_by_default():
    """A share p, as measured, is multiplied by k, the others by what keeps the mean multiplier 1."""
    delta, gradient = gaussian(40, 50), gaussian(40, 50, seed=1)
    context = Context("w", evidence=Evidence(gradient=gradient))
    below = delta * gradient < 0
    p = below.double().mean().item()
    found = DareKGradient(k=0.25).apply(delta, context) / delta
    torch.testing.assert_close(found[below], torch.full_like(found[below], 0.25))
    others = torch.full_like(found[~below], (1 - 0.25 * p) / (1 - p))
    torch.testing.assert_close(found[~below], others)
    assert found.mean().item() == pytest.approx(1.0, abs=1e-5)


def test_della_keeps_each_rank_at_its_own_rate():
    # 4096 rows with the same order of magnitudes: column j has rank j + 1.
    delta = torch.arange(1, 9, dtype=torch.float32).repeat(4096, 1)
    edit = Della(drop=0.5, window=0.4, seed=1)
    found = edit.apply(delta, W)
    odds = torch.linspace(0.3, 0.7, 8)
    rates = (found != 0).float().mean(0)
    assert ((rates - odds).abs() <= 4 * (odds * (1 - odds) / 4096).sqrt()).all()
    torch.testing.assert_close(found[found != 0], (delta / odds)[found != 0])
    unscaled = Della(drop=0.5, window=0.4, seed=1, rescale=False).apply(delta, W)
    assert torch.equal(unscaled != 0, found != 0)
    assert torch.equal(unscaled[unscaled != 0], delta[unscaled != 0])


def test_della_by_magnitude_and_over_the_tensor():
    delta = torch.tensor([[1.0, -2.0], [5.0, 3.0]])
    linear = Della(drop=0.5, window=0.4, by="magnitude", over="tensor").probabilities(delta)
    torch.testing.assert_close(linear, torch.tensor([[0.3, 0.4], [0.7, 0.5]]))
    ranked = Della(drop=0.5, window=0.6, over="tensor").probabilities(delta)
    torch.testing.assert_close(ranked, torch.tensor([[0.2, 0.4], [0.8, 0.6]]))
    rows = Della(drop=0.5, window=0.6).probabilities(delta)
    torch.testing.assert_close(rows, torch.tensor([[0.2, 0.8], [0.8, 0.2]]))


def test_stratified_keeps_one_entry_in_every_group_evenly():
    found = Stratified(group=4, seed=3).apply(ONES, W)
    groups = found.reshape(-1, 4)
    assert torch.equal((groups != 0).sum(1), torch.ones(len(groups), dtype=torch.int64))
    assert torch.equal(groups.sum(1), torch.full((len(groups),), 4.0))
    places = groups.argmax(1).bincount(minlength=4) / len(groups)
    assert ((places - 0.25).abs() <= 4 * math.sqrt(0.25 * 0.75 / len(groups))).all()


def test_the_last_group_of_a_row_counts_its_own_entries():
    found = Stratified(group=4).apply(torch.ones(50, 6), W)
    assert torch.equal(found[:, :4].sum(1), torch.full((50,), 4.0))
    assert torch.equal(found[:, 4:].sum(1), torch.full((50,), 2.0))


@pytest.mark.parametrize("keep", [0.001, 0.2, 0.5, 1.0])
def test_the_threshold_is_exact_across_tensors(keep):
    tensors = [gaussian(7, 30), gaussian(1, 11, seed=1) * 1e-6, torch.zeros(3, 3), torch.empty(0)]
    every = torch.cat([t.abs().reshape(-1) for t in tensors]).sort(descending=True).values
    expected = every[max(round(keep * len(every)), 1) - 1].item()
    pairs = [(t, t * 2) for t in tensors]
    assert magnitude_thresholds(lambda: pairs, 2, keep) == [expected, 2 * expected]


def test_a_threshold_of_nothing_is_zero():
    assert tensor_threshold(torch.empty(0), 0.2) == 0
    assert tensor_threshold(torch.zeros(5), 0.2) == 0


def test_trim_keeps_the_top_of_all_tensors_or_of_each():
    small, large = torch.tensor([0.1, -0.2, 0.3, 0.05]), torch.tensor([9.0, -8.0, 7.0, 1.0])
    whole = Trim(keep=0.5).survey([("a", small), ("b", large)])
    assert torch.equal(whole.apply(small, W), torch.zeros(4))
    assert torch.equal(whole.apply(large, W), large)
    each = Trim(keep=0.5, scope="tensor").survey([("a", small), ("b", large)])
    assert torch.equal(each.apply(small, W), torch.tensor([0.0, -0.2, 0.3, 0.0]))
    assert torch.equal(each.apply(large, W), torch.tensor([9.0, -8.0, 0.0, 0.0]))


def test_darex_q_follows_its_criterion():
    delta, inputs = gaussian(40, 60) * 3, gaussian(200, 60, seed=1) + 0.7
    drop, eta = 0.9, 0.45
    c = delta.double() * inputs.double().mean(0)
    phi = (1 - 2 * drop) / math.log((1 - drop) / drop)
    grid = torch.tensor([max(i * 0.001, 1 - drop) for i in range(100, 999)], dtype=torch.float64)
    first = eta * (1 - (1 - drop) / grid) * c.sum(1, keepdim=True)
    second = eta**2 * phi * c.square().sum(1, keepdim=True) / (4 * grid**2)
    residues = (first + second + math.log(40)).abs().half()
    # One output by itself ends the search at its first rise, or one later at a tie.
    for row in range(len(delta)):
        later, before = residues[row, 1:], residues[row, :-1]
        stops = later >= before
        place = int(stops.int().argmax()) if stops.any() else len(stops)
        place += int(place < len(stops) and later[place] == before[place])
        expected = grid[place].item()
        assert divisor(delta[row : row + 1], inputs, drop) == pytest.approx(expected)
    chosen = divisor(delta, inputs, drop)
    assert 1 - drop < chosen < 1
    # Small deltas hardly move the criterion.
    assert divisor(delta * 1e-3, inputs, drop) == pytest.approx(1 - drop, abs=0.002)
    context = Context("w", evidence=Evidence(inputs=inputs))
    found = DarexQ(drop=drop).apply(delta, context)
    plain = DareEdit(drop=drop).apply(delta, W)
    torch.testing.assert_close(found * divisor(delta, inputs, drop), plain * (1 - drop))


def test_without_inputs_darex_q_is_dare():
    delta = gaussian(4, 50)
    found = DarexQ(drop=0.6, seed=1).apply(delta, Context("w", evidence=Evidence()))
    assert torch.equal(found, DareEdit(drop=0.6, seed=1).apply(delta, W))


def safe_moments(moments: torch.Tensor) -> Evidence:
    """Of the aligned model; what the fine-tune sees is another thing, and must not matter."""
    return Evidence(second_moment=torch.eye(len(moments)) * 7, safe=Evidence(second_moment=moments))


def test_safe_delta_takes_nothing_without_a_budget_and_all_but_the_dearest_with_any():
    delta, found_moments = gaussian(12, 40) * 0.1, moments(40)
    context = Context("w", evidence=safe_moments(found_moments))
    assert not SafeDelta(budget=0.0).apply(delta, context).any()
    found = SafeDelta(budget=1e30).apply(delta, context)
    price = inverse_cholesky(damped(found_moments)).diagonal() ** -2
    kept, dearest = price.argsort()[:34], price.argsort()[34:]
    assert torch.equal(found[:, kept], delta[:, kept])
    assert not torch.equal(found[:, dearest], delta[:, dearest])


def test_safe_delta_without_correlations_takes_or_leaves():
    delta = gaussian(64, 40)
    context = Context("w", evidence=safe_moments(torch.eye(40)))
    found = SafeDelta(budget=500.0).apply(delta, context)
    taken = found != 0
    assert torch.equal(found[taken], delta[taken])
    # All columns cost the same, so the budget is the sum of squares that is taken, in order.
    price = 1.01
    running = (delta.double() ** 2 * price).T.reshape(-1).cumsum(0)
    allowed = price * 500 / 2 * 64 / 4096
    assert int(taken.sum()) == int((running <= allowed).sum())
    assert 0 < int(taken.sum()) < 0.85 * delta.numel()


def test_safe_delta_keeps_safe_answers_closer_than_taking_alone():
    delta, second = gaussian(32, 64) * 0.1, moments(64)
    found = SafeDelta(budget=3.0).apply(delta, Context("w", evidence=safe_moments(second)))

    def moved(change):
        return torch.trace(change @ second @ change.T).item()

    taken = torch.where((found - delta).abs() < 1e-7, delta, 0.0)
    assert 0 < int((taken != 0).sum()) < delta.numel()
    assert moved(found) < 0.9 * moved(taken)


def irr_context(delta: torch.Tensor, second: torch.Tensor, safety: torch.Tensor) -> Context:
    base = torch.zeros_like(delta)
    fisher = gaussian(*delta.shape, seed=7).abs()
    evidence = Evidence(
        second_moment=second,
        fisher=torch.ones_like(fisher),
        references={"unaligned": -safety},
        safe=Evidence(fisher=fisher),
    )
    return Context("w", base=base, evidence=evidence)


def test_irr_without_correlations_removes_what_points_away():
    delta, safety = gaussian(9, 30), gaussian(9, 30, seed=3)
    context = irr_context(delta, torch.eye(30), safety)
    agree = delta.sign() == safety.sign()
    assert torch.equal(Irr().apply(delta, context), torch.where(agree, delta, 0.0))
    assert torch.equal(Irr(spare=1.0).apply(delta, context), delta)
    assert not Irr(more=True).apply(delta, context).any()


def test_irr_spares_what_matters_least_for_safety():
    delta, safety = gaussian(6, 20), gaussian(6, 20, seed=3)
    context = irr_context(delta, torch.eye(20), safety)
    found = Irr(spare=0.5, block=20).apply(delta, context)
    against = delta.sign() != safety.sign()
    fisher = context.evidence.fisher
    removed = against & (found == 0)
    assert int(removed.sum()) == int(against.sum()) - int(against.sum()) // 2
    assert fisher[removed].min() >= fisher[against & (found != 0)].max()


def test_irr_recalibrates_what_stays():
    delta, safety, second = gaussian(16, 48) * 0.1, gaussian(16, 48, seed=3), moments(48)
    context = irr_context(delta, second, safety)
    found = Irr(block=16).apply(delta, context)
    masked = torch.where(found != 0, delta, 0.0)

    def lost(edited):
        return torch.trace((delta - edited) @ second @ (delta - edited).T).item()

    assert bool(((found == 0) == (masked == 0)).all())
    assert lost(found) < 0.9 * lost(masked)


def test_evidence_that_was_not_seen_is_asked_for_by_name():
    context = Context("w", base=torch.zeros(2, 3), evidence=Evidence(second_moment=torch.eye(3)))
    with pytest.raises(DeltafoldError, match="'unaligned'") as caught:
        Irr().apply(torch.ones(2, 3), context)
    assert caught.value.code == "needs-calibration"
    with pytest.raises(DeltafoldError, match="gradient of w") as caught:
        DareKGradient().apply(torch.ones(2, 3), context)
    assert caught.value.fix.endswith("'PATTERN=dare-k-gradient'")


def test_irr_leaves_tensors_of_no_linear_layer_alone():
    delta = gaussian(1, 30)[0]
    assert torch.equal(Irr().apply(delta, Context("w", evidence=Evidence())), delta)
