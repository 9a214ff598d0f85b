"""Choosing tokens: truncation, repeatability, and log-probabilities of the raw distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from deltafold.runtime.embedded import sampler
from deltafold.runtime.embedded.sampler import choose, generator, prompt_logprobs
from deltafold.runtime.engine import Sampling


def draws(logits: torch.Tensor, sampling: Sampling, count: int = 400) -> Counter[int]:
    rows = logits.expand(count, -1)
    made = choose(rows, [sampling] * count, [generator(i) for i in range(count)])
    return Counter(c.token for c in made)


LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.0]).log_softmax(-1)


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    made = choose(torch.tensor([[0.0, 7.0, 7.0]]), [Sampling()], [generator(0)])
    assert made[0].token == 1


def test_frequencies_follow_probabilities_at_the_temperature() -> None:
    found = draws(LOGITS, Sampling(temperature=0.7), 4000)
    expected = (LOGITS / 0.7).softmax(-1)
    for token, p in enumerate(expected.tolist()):
        assert found[token] / 4000 == pytest.approx(p, abs=0.03)


@pytest.mark.parametrize("temperature", [1e-30, 1e-4])
def test_cold_is_greedy_and_never_overflows(temperature: float) -> None:
    assert draws(LOGITS * 1e4, Sampling(temperature=temperature)) == {1: 400}


def test_hot_is_uniform() -> None:
    found = draws(LOGITS, Sampling(temperature=1e6), 4000)
    assert all(abs(found[t] / 4000 - 0.2) < 0.04 for t in range(5))


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1.0, top_k=1), {1}),
        (Sampling(temperature=1.0, top_k=2), {1, 2}),
        (Sampling(temperature=1.0, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(temperature=9.0, top_p=1e-9), {1}),
        (Sampling(temperature=1.0, top_p=0.7), {1, 2}),
        (Sampling(temperature=1.0, top_p=1.0), {0, 1, 2, 3, 4}),
        # Top-k comes first: of the two that are left, 1 alone has 73 %.
        (Sampling(temperature=1.0, top_k=2, top_p=0.7), {1}),
    ],
)
def test_truncation_keeps_the_smallest_sufficient_set(
    sampling: Sampling, allowed: set[int]
) -> None:
    assert set(draws(LOGITS, sampling, 2000)) == allowed


def test_a_flat_nucleus_that_exceeds_the_first_look_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.zeros(500)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    whole = draws(logits, sampling, 3000)
    monkeypatch.setattr(sampler, "_FIRST_LOOK", 2)
    assert draws(logits, sampling, 3000) == whole
    assert len(whole) == pytest.approx(450, abs=5)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd() -> None:
    noise = torch.Generator().manual_seed(0)
    steps = torch.randn(30, 200, generator=noise)
    mine = [
        Sampling(temperature=0.8, top_p=0.9, seed=5),
        Sampling(temperature=1.3, seed=6),
        Sampling(temperature=1.0, top_k=7, seed=7),
    ]

    def run(crowd: list[Sampling], at: int, own: Sampling) -> list[int]:
        samplings = [*crowd[:at], own, *crowd[at:]]
        generators = [generator(s.seed) for s in samplings]
        out = []
        for step in steps:
            rows = torch.randn(len(samplings), 200, generator=noise)
            rows[at] = step
            out.append(choose(rows, samplings, generators)[at].token)
        return out

    crowd = [Sampling(temperature=2.0), Sampling(), Sampling(temperature=1.0, top_k=190)]
    for own in mine:
        alone = run([], 0, own)
        assert run(crowd, 1, own) == alone
        assert run(crowd[::-1], 3, own) == alone
        assert len(set(alone)) > 5


def test_seeds_differ_by_sign_and_none_is_random() -> None:
    assert generator(1).random() != generator(-1).random()
    assert generator(None).random() != generator(None).random()


def test_logprobs_are_raw_float32_whatever_the_temperature() -> None:
    noise = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=noise).bfloat16()
    samplings = [
        Sampling(logprobs=3),
        Sampling(temperature=0.1, top_k=1, logprobs=0),
        Sampling(),
    ]
    made = choose(logits, samplings, [generator(0)] * 3)
    expected = logits.float().log_softmax(-1)
    for row in (0, 1):
        assert made[row].logprob == expected[row, made[row].token].item()
    values, ids = expected[0].topk(3)
    assert [(x.token, x.logprob) for x in made[0].top] == list(
        zip(ids.tolist(), values.tolist(), strict=True)
    )
    assert made[1].top == ()
    assert made[2].logprob is None


def test_more_alternatives_than_tokens() -> None:
    made = choose(LOGITS.unsqueeze(0), [Sampling(logprobs=99)], [generator(0)])
    assert [x.token for x in made[0].top] == [1, 2, 0, 4, 3]


def test_prompt_logprobs() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    found = prompt_logprobs(logits, [0, 0], 1)
    assert found[0][0].logprob == pytest.approx(LOGITS[0].item())
    assert found[1][0].logprob == pytest.approx(LOGITS[4].item())
    assert [top[0].token for _, top in found] == [1, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_seen(bad: float) -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = bad
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)):
        made = choose(logits, [sampling] * 2, [generator(0), generator(1)])
        assert [c.finite for c in made] == [True, False]


def test_hidden_tokens_are_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    assert set(draws(logits, Sampling(temperature=5.0))) == {0, 2}
    assert set(draws(logits, Sampling(temperature=5.0, top_p=0.99))) == {0, 2}
