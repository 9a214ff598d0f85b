"""Edits that look at the whole model before the first tensor is changed."""

from __future__ import annotations

import pytest
import torch
from checkpoints import Pair
from packing import pack

from deltafold.compress import DeltaRepo, Recipe, parse_spec
from deltafold.compress.edits import Trim
from deltafold.compress.recipe import parse_edit_for

DENSE = parse_spec("exact")


def recipe(*edits: str, **others: str) -> Recipe:
    chosen = {name: parse_spec(spec) for name, spec in others.items()}
    return Recipe(**{"default": DENSE, **chosen}, edits=tuple(map(parse_edit_for, edits)))


def deltas(pair: Pair) -> dict[str, torch.Tensor]:
    both = {n: pair.base_tensors[n] for n in pair.variant_tensors if n in pair.base_tensors}
    floats = {n: b for n, b in both.items() if b.is_floating_point()}
    return {n: pair.variant_tensors[n].float() - b.float() for n, b in floats.items()}


def found(repo: DeltaRepo, pair: Pair, name: str) -> torch.Tensor:
    if name in repo.manifest.unchanged:
        return torch.zeros_like(pair.base_tensors[name], dtype=torch.float32)
    return repo.delta(name, pair.base_tensors[name])


def threshold(tensors: list[torch.Tensor], keep: float) -> float:
    every = torch.cat([t.abs().reshape(-1) for t in tensors]).sort(descending=True).values
    return every[round(keep * len(every)) - 1].item()


def check(pair: Pair, repo: DeltaRepo, expected: dict[str, torch.Tensor]) -> None:
    assert any(bool((e == 0).any() and (e != 0).any()) for e in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found(repo, pair, name), value, rtol=0, atol=0)


def test_trim_looks_at_all_tensors_before_it_changes_the_first(pair):
    repo = pack(pair, recipe("trim:keep=0.3"))
    every = deltas(pair)
    least = threshold(list(every.values()), 0.3)
    check(pair, repo, {n: torch.where(d.abs() >= least, d, 0.0) for n, d in every.items()})
    assert repo.manifest.recipe["edits"] == ["trim:keep=0.3"]


@pytest.mark.parametrize("by", [0.0, 1.0, 1.5])
def test_scale_is_linear_in_all_that_differs(pair, by):
    repo = pack(pair, recipe(f"scale:by={by}"))
    for name, delta in deltas(pair).items():
        torch.testing.assert_close(found(repo, pair, name), delta * by, rtol=0, atol=0)


def test_a_survey_sees_what_the_edits_before_it_leave(pair):
    repo = pack(pair, recipe("*mlp*=scale:by=100", "trim:keep=0.3"))
    every = {n: d * 100 if "mlp" in n else d for n, d in deltas(pair).items()}
    least = threshold(list(every.values()), 0.3)
    check(pair, repo, {n: torch.where(d.abs() >= least, d, 0.0) for n, d in every.items()})


def test_a_survey_sees_only_the_tensors_that_are_edited(pair):
    repo = pack(pair, recipe(default="trim:keep=0.3+exact"))
    every = deltas(pair)
    matrices = {n: d for n, d in every.items() if d.dim() >= 2}
    least = threshold(list(matrices.values()), 0.3)
    expected = {n: torch.where(d.abs() >= least, d, 0.0) for n, d in matrices.items()}
    check(pair, repo, {**every, **expected})


def test_patterns_are_surveyed_each_for_itself(pair):
    repo = pack(pair, recipe("*mlp*=trim:keep=0.1", "*attn*=trim:keep=0.5"))
    expected = {}
    for part, keep in (("mlp", 0.1), ("attn", 0.5)):
        mine = {n: d for n, d in deltas(pair).items() if part in n}
        least = threshold(list(mine.values()), keep)
        expected |= {n: torch.where(d.abs() >= least, d, 0.0) for n, d in mine.items()}
    check(pair, repo, expected)


def test_a_given_threshold_needs_no_survey():
    edit = Trim(threshold=0.5)
    assert edit.survey(iter(())) is edit
