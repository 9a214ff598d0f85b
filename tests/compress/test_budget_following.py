"""Budgets whose candidates go by what the other tensors are given: promises hold there too."""

from __future__ import annotations

import json

import pytest
import torch
import zoo_models

from deltafold.compress import (
    Budget,
    Checkpoint,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    parse_spec,
    plan_checkpoint,
)
from deltafold.compress.calibration import CalibratedJudge, calibrate, decoded_tensors

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
SEQUENTIAL = ("deltazip:bits=2", "svd-widths:bits=2", "bitdelta:bits=4,group=16")
WHOLE_MODEL = (
    "ultradelta:drop=0.4,step=0.1",
    "trim:keep=0.1+sparse:bits=4",
    "trim:keep=0.5+sparse:bits=4",
    "int:bits=6",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("following")
    return zoo_models.make(folder, codecs={"one": "bitdelta"}, step=0.05, **SMALL)


@pytest.fixture(scope="module")
def full(made):
    return made.base.parent / "full" / "one"


@pytest.fixture
def evidence(made, full):
    draw = torch.Generator().manual_seed(0)
    path = made.base.parent / "rows.jsonl"
    rows = [torch.randint(2, 128, (12,), generator=draw).tolist() for _ in range(6)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return calibrate(made.base, full, path, wanted=("activations", "sequential"))


def budget(candidates, **goal) -> Recipe:
    return Recipe(budget=Budget(**goal, candidates=tuple(map(parse_spec, candidates))))


def lost(made, full, repo) -> float:
    """What a plan without gradients counts, from the written files."""
    base, target = Checkpoint.open(made.base), Checkpoint.open(full)
    found = decoded_tensors(base, repo)
    total = 0.0
    for name in repo.manifest.tensors:
        own = target.tensor(name).double()
        total += float((found[name].double() - own).square().sum() / own.square().sum())
    return total


@pytest.mark.parametrize("candidates", [SEQUENTIAL, WHOLE_MODEL], ids=["sequential", "whole"])
@pytest.mark.parametrize("size", ["48%", "60%"])
def test_sizes_and_errors_are_those_that_packing_then_has(
    made, full, evidence, tmp_path, candidates, size
):
    known = evidence if candidates is SEQUENTIAL else None
    recipe = budget(candidates, target_size=size)
    planned = plan_checkpoint(made.base, full, recipe=recipe, evidence=known)
    out = tmp_path / "out"
    report = compress_checkpoint(made.base, full, out, recipe=recipe, evidence=known)
    totals = report.manifest.totals
    assert len(planned.codecs) > 2
    assert any(spec in planned.codecs for spec in candidates[:3])
    assert report.plan == planned
    assert totals.delta_bytes == planned.nbytes
    assert totals.delta_bytes <= recipe.budget.target_bytes(totals.variant_bytes)
    assert lost(made, full, DeltaRepo.open(out)) == pytest.approx(planned.error, rel=1e-4)


def test_a_recipe_of_such_codecs_is_known_before_too(made, full, evidence, tmp_path):
    recipe = Recipe(default=parse_spec("svd-widths:bits=2"))
    planned = plan_checkpoint(made.base, full, recipe=recipe, evidence=evidence)
    out = tmp_path / "out"
    report = compress_checkpoint(made.base, full, out, recipe=recipe, evidence=evidence)
    assert report.manifest.totals.delta_bytes == planned.nbytes
    assert lost(made, full, DeltaRepo.open(out)) == pytest.approx(planned.error, rel=1e-4)


def test_a_kl_is_probed_behind_compressed_tensors_and_kept(made, full, evidence, tmp_path):
    judge, out = CalibratedJudge(evidence), tmp_path / "out"
    recipe = budget(SEQUENTIAL, max_kl=0.1)
    report = compress_checkpoint(
        made.base, full, out, recipe=recipe, evidence=evidence, judge=judge
    )
    plan, quality = report.plan, report.manifest.quality
    assert {"deltazip:bits=2", "svd-widths:bits=2"} & set(plan.codecs)
    assert quality["kl_mean"] <= 0.1
    # Probes ran what packing then wrote.
    assert quality["kl_mean"] == pytest.approx(plan.kl, rel=1e-3)
    assert report.manifest.totals.delta_bytes == plan.nbytes
    assert plan.nbytes in [point.nbytes for point in plan.frontier]


def test_a_fixed_tensor_may_follow_as_well(made, full, evidence, tmp_path):
    recipe = Recipe(
        overrides=(("*o_proj*", parse_spec("deltazip:bits=4")),),
        budget=Budget("50%", candidates=tuple(map(parse_spec, ("bitdelta", "int:bits=4")))),
    )
    out = tmp_path / "out"
    report = compress_checkpoint(made.base, full, out, recipe=recipe, evidence=evidence)
    assert report.manifest.totals.delta_bytes == report.plan.nbytes
    assert report.plan.codecs["deltazip"] == 2
    assert lost(made, full, DeltaRepo.open(out)) == pytest.approx(report.plan.error, rel=1e-4)
