"""Merges: their specs, what all of them keep, and numbers that can be worked out on paper."""

from __future__ import annotations

import math

import pytest
import torch

from deltafold.compress import DeltafoldError
from deltafold.compress.evidence import NEEDS
from deltafold.compress.merges import (
    MERGES,
    DareTask,
    DareTies,
    DellaTies,
    DropAndSum,
    SurveyedMerge,
    Task,
    Ties,
    parse_merge,
)
from deltafold.compress.spec import spec_of
from deltafold.compress.terms import Context

SPECS = [
    "dare-task",
    "dare-task:drop=0.2,scale=1.0,seed=4",
    "dare-ties",
    "dare-ties:drop=0.2,keep=0.5",
    "della-ties",
    "della-ties:drop=0.5,over=tensor",
    "drop-and-sum",
    "drop-and-sum:drop=0.2,rescale=true",
    "task",
    "task:scale=1.0",
    "ties",
    "ties:keep=0.5,scale=0.8",
    "twin",
    "twin:scale=0.5,keep=0.25",
]
every_spec = pytest.mark.parametrize("spec", SPECS)
W = Context("w")


def merged(method, deltas, weights=None, name="w"):
    weights = weights or [1.0] * len(deltas)
    if isinstance(method, SurveyedMerge):
        method = method.survey([(name, deltas)], weights)
    return method.merge(deltas, weights, Context(name))


def draws(*shape: int, count: int = 3) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=made) for _ in range(count)]


def test_every_merge_has_a_spec():
    assert {spec.partition(":")[0] for spec in SPECS} == set(MERGES)


@every_spec
def test_specs_come_back(spec):
    chosen = parse_merge(spec)
    assert parse_merge(spec_of(chosen)) == chosen
    assert set(chosen.needs) <= set(NEEDS)
    assert chosen.summary
    assert chosen.paper


@every_spec
@pytest.mark.parametrize("shape", [(), (5,), (7, 13), (3, 5, 33), (0, 4)], ids=str)
def test_merges_keep_shapes_inputs_and_zeros(spec, shape):
    deltas = draws(*shape)
    before = [d.clone() for d in deltas]
    found = merged(parse_merge(spec), deltas, [1.0, 0.5, 2.0])
    assert (found.dtype, tuple(found.shape)) == (torch.float32, shape)
    assert bool(torch.isfinite(found).all())
    assert all(torch.equal(b, d) for b, d in zip(before, deltas, strict=True))
    assert torch.equal(merged(parse_merge(spec), deltas, [1.0, 0.5, 2.0]), found)
    assert not merged(parse_merge(spec), [torch.zeros(shape)] * 3).any()


def test_task_is_the_weighted_sum():
    first, second = draws(4, 5, count=2)
    found = merged(Task(scale=0.5), [first, second], [1.0, 3.0])
    torch.testing.assert_close(found, 0.5 * first + 1.5 * second)


def test_ties_by_hand():
    # Top half of each: |.| >= 3 in the first, >= 2 in the second, >= 4 in the third.
    first = torch.tensor([4.0, -3.0, 1.0, 3.0, -1.0, 0.5])
    second = torch.tensor([-2.0, 1.0, -5.0, 2.0, 0.2, 0.1])
    third = torch.tensor([6.0, -4.0, 4.0, 0.1, 0.3, 1.0])
    # Elected: + (4-2+6), - (-3-4), - (-5+4), + (3+2); nothing is left of the last two.
    expected = torch.tensor([(4.0 + 6.0) / 2, (-3.0 - 4.0) / 2, -5.0, (3.0 + 2.0) / 2, 0.0, 0.0])
    assert torch.equal(merged(Ties(keep=0.5), [first, second, third]), expected)
    assert torch.equal(merged(Ties(keep=0.5, scale=2.0), [first, second, third]), 2 * expected)


def test_ties_trims_the_whole_model_and_not_each_tensor():
    small, large = [torch.tensor([1.0, 2.0])] * 2, [torch.tensor([30.0, 40.0])] * 2
    ready = Ties(keep=0.5).survey([("small", small), ("large", large)], [1.0, 1.0])
    assert torch.equal(ready.merge(small, [1.0, 1.0], Context("small")), torch.zeros(2))
    assert torch.equal(ready.merge(large, [1.0, 1.0], Context("large")), large[0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_exact_tie_takes_the_majority_of_the_model(sign):
    first, second = torch.tensor([2.0, 1.0, 1.0]) * sign, torch.tensor([-2.0, 1.0, 1.0]) * sign
    # The majority is that of the sums: two of one sign, and none of the other.
    assert torch.equal(merged(Ties(keep=1.0), [first, second])[0], torch.tensor(2.0 * sign))


def test_weights_count_in_the_election_and_in_the_mean():
    deltas = [torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 4.0])]
    found = merged(Ties(keep=1.0), deltas, [3.0, 1.0])
    assert found.tolist() == [1.0, (3 * 1.0 + 4.0) / 4]


@pytest.mark.parametrize("method", [Ties(), DareTies(), DellaTies()])
def test_elections_refuse_weights_that_are_not_positive(method):
    with pytest.raises(DeltafoldError) as caught:
        merged(method, draws(3, 3, count=2), [1.0, -1.0])
    assert caught.value.code == "bad-argument"


def test_dare_before_task_keeps_the_expected_sum():
    ones = [torch.ones(400, 500)] * 2
    found = merged(DareTask(drop=0.5, scale=1.0), ones)
    # Each is 0 or 2: independent masks give 0, 2 and 4.
    assert found.unique().tolist() == [0.0, 2.0, 4.0]
    assert abs(found.mean().item() - 2) <= 4 * math.sqrt(2 / found.numel())


def test_dare_before_the_election_averages_what_was_kept():
    first, second = torch.full((50, 60), 1.0), torch.full((50, 60), 3.0)
    found = merged(DareTies(drop=0.5), [first, second])
    assert found.unique().tolist() == [0.0, 2.0, 4.0, 6.0]
    trimmed = merged(DareTies(drop=0.5, keep=0.2), [first, second])
    assert torch.equal(trimmed != 0, found != 0)  # all that was kept of one model is equally large


def test_della_before_the_election_prunes_each_delta_by_its_own_chances():
    first, second = draws(30, 40, count=2)
    found = merged(DellaTies(drop=0.5, window=0.2, scale=1.0), [first, second])
    neither = (found == 0).float().mean().item()
    assert neither == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("name", ["dare-task", "dare-ties", "della-ties", "drop-and-sum"])
def test_seeds_begin_again_after_the_largest(name):
    """The second delta's seed is then the first one there is."""
    delta, nothing = torch.ones(40, 50), torch.zeros(40, 50)
    last = merged(parse_merge(f"{name}:seed={2**64 - 1}"), [nothing, delta])
    assert last.any()
    assert torch.equal(last, merged(parse_merge(f"{name}:seed=0"), [delta, nothing]))


def test_della_before_the_election_by_hand():
    """Windows of no width drop all ranks alike; with a drop of next to nothing it is TIES of all."""
    first = torch.tensor([[4.0, -3.0, 1.0, 0.5]])
    second = torch.tensor([[-2.0, -1.0, 3.0, 0.5]])
    # Elected: + (4 - 2), - , +, +; the means of those that agree.
    expected = torch.tensor([[4.0, -2.0, 2.0, 0.5]])
    found = merged(DellaTies(drop=1e-6, window=0.0, scale=1.0), [first, second])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    # What half of the entries leave is twice as large, so that the sum stays: 2, 1, or nothing.
    ones = torch.ones(200, 300)
    dropped = merged(DellaTies(drop=0.5, window=0.0, scale=1.0), [ones, ones])
    assert dropped.unique().tolist() == [0.0, 2.0]


def test_drop_and_sum_keeps_one_in_as_many_as_there_are():
    ones = [torch.ones(300, 400)] * 4
    found = merged(DropAndSum(), ones)
    assert abs(found.mean().item() - 1) <= 4 * math.sqrt(4 * 0.25 * 0.75 / found.numel())
    torch.testing.assert_close(merged(DropAndSum(rescale=True), ones), found * 4)


@pytest.mark.parametrize(
    "spec",
    [
        "dare-task:drop=1",
        "dare-ties:keep=0",
        "della-ties:window=2",
        "drop-and-sum:seed=-1",
        "task:scale=nan",
        "ties:keep=1.5",
        "twin:keep=0",
    ],
)
def test_wrong_merges_end_in_the_fix(spec):
    with pytest.raises(DeltafoldError) as caught:
        parse_merge(spec)
    assert caught.value.code == "bad-recipe"
    assert caught.value.fix.startswith(f"--method {spec.partition(':')[0]}:")
