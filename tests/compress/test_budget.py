"""The budget planner: what it chooses, what it promises, and that both hold."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from checkpoints import write_checkpoint
from packing import pack

from deltafold.compress import Checkpoint, DeltafoldError, Recipe, parse_spec
from deltafold.compress.budget.allocate import Frontier, Option, hull, total
from deltafold.compress.budget.goal import Budget
from deltafold.compress.budget.probe import rebuilt
from deltafold.compress.budget.search import smallest_within
from deltafold.compress.pipeline import plan_checkpoint
from deltafold.compress.shards import ShardWriter, planned_bytes


def options(seed: int, tensors: int = 4, each: int = 5) -> dict[str, list[Option]]:
    """Random options, on and off the hull."""
    draw = random.Random(seed)
    return {
        f"t{i}": [
            Option(f"c{j}", draw.randint(1, 40), draw.random() * draw.choice([1, 10]))
            for j in range(each)
        ]
        for i in range(tensors)
    }


def best_by_force(table: dict[str, list[Option]], budget: int) -> float:
    choices = itertools.product(*table.values())
    fitting = [c for c in choices if sum(o.cost for o in c) <= budget]
    return min((sum(o.error for o in c) for c in fitting), default=float("inf"))


@pytest.mark.parametrize("seed", range(5))
def test_the_walk_is_exact_wherever_it_stops(seed):
    table = options(seed)
    frontier = Frontier(table)
    for point in frontier.points:
        assert point.error == pytest.approx(best_by_force(table, point.cost))
        assert total(frontier.at(point.steps))[1:] == pytest.approx(point[1:])


@pytest.mark.parametrize("seed", range(5))
def test_between_two_stops_it_is_no_worse_than_the_first_and_never_too_large(seed):
    table = options(seed)
    frontier = Frontier(table)
    slack = []
    for budget in range(frontier.points[0].cost, frontier.points[-1].cost + 10):
        chosen = total(frontier.within(budget))
        last = [p for p in frontier.points if p.cost <= budget][-1]
        best = best_by_force(table, budget)
        assert chosen.cost <= budget
        assert best - 1e-9 <= chosen.error <= last.error + 1e-9
        slack.append((chosen.error - best, last.error - best))
    # What is left over is spent: over all sizes, filling in comes closer to the best there is.
    assert sum(a for a, _ in slack) < sum(b for _, b in slack)
    assert frontier.within(frontier.points[0].cost - 1) is None


def test_the_hull_leaves_out_what_no_slope_would_choose():
    good = [Option("a", 1, 8.0), Option("b", 2, 4.0), Option("c", 4, 1.0)]
    dull = [Option("above", 3, 3.0), Option("worse", 2, 5.0), Option("dearer", 9, 1.0)]
    assert hull([*dull, *good]) == good


@pytest.mark.parametrize("limit", [0.5, 0.05, 0.003, 1e-6])
def test_the_search_finds_the_first_place_that_is_good_enough(limit):
    points = Frontier(options(7, tensors=20, each=8)).points
    probed = []

    def kl_at(step: int) -> float:
        probed.append(step)
        return 0.02 * points[step].error ** 1.3

    found = smallest_within(points, limit, kl_at)
    best = next((p for p in points if kl_at(p.steps) <= limit), None)
    if best is None:
        assert found.steps is None
    else:
        assert found.kl[found.steps] <= limit
        assert best.cost <= points[found.steps].cost <= 1.01 * best.cost
    assert len(found.kl) <= 16


@pytest.mark.parametrize("max_bytes", [50, 200, 10**6])
def test_shards_weigh_what_was_planned(tmp_path, max_bytes):
    writer = ShardWriter(tmp_path, "delta", {"format": "x"}, max_bytes=max_bytes)
    tensors = {
        f"layer.{i}.{'w' * i}": torch.zeros((i, 7), dtype=dtype)
        for i, dtype in enumerate([torch.uint8, torch.float32, torch.int64, torch.bfloat16] * 3)
    }
    for key, tensor in tensors.items():
        writer.add(key, tensor)
    files = writer.finish()
    parts = [(key, t.dtype, t.shape) for key, t in tensors.items()]
    planned = planned_bytes(parts, "delta", {"format": "x"}, max_bytes=max_bytes)
    assert sum(f.stat().st_size for f in files) == planned


def budgeted(size: str, **options) -> Recipe:
    return Recipe(budget=Budget(target_size=size, **options))


@pytest.mark.parametrize("size", ["25%", "40%", "70%", "15000", "9KiB"])
def test_the_size_is_met_and_was_known_before(pair, size):
    planned = plan_checkpoint(pair.base, pair.variant, recipe=budgeted(size))
    assert not pair.out.exists()
    repo = pack(pair, budgeted(size))
    totals = repo.manifest.totals
    assert totals.delta_bytes == planned.nbytes <= Budget(size).target_bytes(totals.variant_bytes)
    assert totals.delta_bytes > 0.85 * Budget(size).target_bytes(totals.variant_bytes)
    assert repo.manifest.recipe == planned.recipe.to_json()
    # The manifest's recipe is an ordinary one, and makes the same delta.
    again = pack(replace(pair, root=pair.root / "again"), Recipe.from_mapping(repo.manifest.recipe))
    assert again.digest == repo.digest


def test_planned_sizes_hold_without_a_budget_too(pair):
    for spec in ("lossless", "int:bits=4,group=32", "dare:drop=0.7"):
        recipe = Recipe(default=parse_spec(spec))
        planned = plan_checkpoint(pair.base, pair.variant, recipe=recipe)
        root = replace(pair, root=pair.root / spec[:3])
        assert pack(root, recipe).manifest.totals.delta_bytes == planned.nbytes


def test_what_the_user_fixed_stays_fixed(pair):
    recipe = replace(budgeted("40%"), overrides=(("lm_head*", parse_spec("int:bits=8")),))
    repo = pack(pair, recipe)
    assert repo.manifest.recipe["tensors"]["lm_head*"] == "int:bits=8"
    assert repo.terms("lm_head.weight")[0].bits == 8
    assert repo.exact("model.norm.weight")


def test_a_size_below_the_least_is_refused_with_the_least(pair):
    with pytest.raises(DeltafoldError) as caught:
        pack(pair, budgeted("10"))
    assert caught.value.code == "bad-argument"
    smallest = int(dict(caught.value.facts)["smallest"].split()[0].replace(",", ""))
    assert pack(pair, budgeted(str(smallest))).manifest.totals.delta_bytes == smallest
    assert not list(pair.out.parent.glob("*.partial"))


@pytest.mark.parametrize(
    ("budget", "code"),
    [
        ({"target_size": "10%", "max_kl": 0.1}, "bad-argument"),
        ({}, "bad-argument"),
        ({"target_size": "ten"}, "bad-argument"),
        ({"target_size": "10 percent"}, "bad-argument"),
        ({"max_kl": "much"}, "bad-recipe"),
        ({"max_kl": -1}, "bad-argument"),
        ({"size": "10%"}, "bad-recipe"),
        ({"target_size": "10%", "candidates": "int"}, "bad-recipe"),
        ({"target_size": "10%", "candidates": ["magic"]}, "unknown-codec"),
        ("10%", "bad-recipe"),
    ],
)
def test_budgets_that_make_no_sense(budget, code):
    with pytest.raises(DeltafoldError) as caught:
        Recipe.from_mapping({"budget": budget})
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("10%", 100), ("2.5 %", 25), ("500MiB", 500 * 2**20), ("1.5gb", 1_500_000_000), ("77", 77)],
)
def test_sizes(text, nbytes):
    assert Budget(text).target_bytes(1000) == nbytes


def uneven(pair) -> None:
    """Rewrite the pair so that tensors want different codecs: one low rank, one large, one tiny."""
    draw = torch.Generator().manual_seed(3)
    base, tuned = {}, {}
    for i, (rank, size) in enumerate([(2, 0.05), (64, 0.02), (64, 0.0005), (64, 0.02), (1, 0.01)]):
        base[f"w{i}.weight"] = torch.randn(96, 96, generator=draw) * 0.05
        left, right = torch.randn(96, rank, generator=draw), torch.randn(rank, 96, generator=draw)
        tuned[f"w{i}.weight"] = base[f"w{i}.weight"] + left @ right * (size / rank**0.5)
    write_checkpoint(pair.base, base)
    write_checkpoint(pair.variant, tuned)


def test_it_beats_one_codec_for_all_at_the_same_size(pair):
    uneven(pair)
    for spec in (
        "bitdelta:bits=1",
        "bitdelta:bits=2,group=64",
        "int:bits=4,group=64",
        "svd:bits=1",
    ):
        alike = plan_checkpoint(pair.base, pair.variant, recipe=Recipe(default=parse_spec(spec)))
        chosen = plan_checkpoint(pair.base, pair.variant, recipe=budgeted(str(alike.nbytes)))
        assert chosen.nbytes <= alike.nbytes
        assert chosen.error < 0.7 * alike.error, spec
        sizes = [p.nbytes for p in chosen.frontier]
        assert sizes == sorted(set(sizes))


@dataclass(frozen=True)
class Clip:
    """An edit that must see the whole model: nothing is larger than half of what is largest."""

    id = "clip"
    summary = paper = "-"
    needs = ()
    limit: float = 0.0

    def survey(self, deltas):
        for _ in range(2):
            most = max(delta.abs().max().item() for _, delta in deltas)
        return Clip(most / 2)

    def apply(self, delta, context):
        return delta.clamp(-self.limit, self.limit)


def test_edits_that_survey_the_model_do_so_before_anything_is_tried(pair):
    source, target = Checkpoint.open(pair.base), Checkpoint.open(pair.variant)
    recipe = Recipe(default=parse_spec("lossless"), edits=(("*", Clip()),))
    found = rebuilt(source, target, recipe)
    floats = [n for n in target.names() if target.tensor(n).is_floating_point()]
    deltas = {n: target.tensor(n).float() - source.tensor(n).float() for n in floats}
    limit = max(d.abs().max().item() for d in deltas.values()) / 2
    name = "model.layers.0.mlp.up_proj.weight"
    expected = source.tensor(name).float() + deltas[name].clamp(-limit, limit)
    assert torch.equal(found[name], expected)
