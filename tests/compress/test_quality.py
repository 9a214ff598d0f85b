"""Quality that was measured: budgets of it, and its place in a delta."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo_models
from checkpoints import make_pair
from packing import tree

import deltafold.server.demo
from deltafold.compress import (
    Budget,
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    parse_spec,
    plan_checkpoint,
    verify_delta,
)
from deltafold.compress.calibration import CalibratedJudge, calibrate
from deltafold.compress.calibration.judge import evaluate_delta
from deltafold.compress.quality import record_quality
from deltafold.server.demo.tasks import apply, held_out_words
from deltafold.server.demo.tokenizer import prompt_of

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    return zoo_models.make(
        folder, codecs={"one": "bitdelta", "two": "bitdelta"}, step=0.03, **SMALL
    )


@pytest.fixture(scope="module")
def full(made):
    return made.base.parent / "full" / "one"


@pytest.fixture(scope="module")
def data(made):
    draw = torch.Generator().manual_seed(0)
    path = made.base.parent / "rows.jsonl"
    rows = [torch.randint(2, 128, (12,), generator=draw).tolist() for _ in range(6)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def evidence(made, full, data):
    return calibrate(made.base, full, data, wanted=("gradients",))


def test_a_budget_of_kl_is_kept_by_the_packed_delta_itself(made, full, data, evidence, tmp_path):
    judge = CalibratedJudge(evidence)
    ratios = []
    for most in (0.3, 0.003):
        out = tmp_path / str(most)
        report = compress_checkpoint(
            made.base,
            full,
            out,
            recipe=Recipe(budget=Budget(max_kl=most)),
            evidence=evidence,
            judge=judge,
        )
        quality = DeltaRepo.open(out).manifest.quality
        assert quality["kl_mean"] <= most
        # Measured again from the files alone.
        again = evaluate_delta(made.base, out, full, data)
        assert again["kl_mean"] == pytest.approx(quality["kl_mean"], rel=1e-4)
        assert report.plan is not None
        assert report.plan.kl == pytest.approx(quality["kl_mean"], rel=1e-4)
        assert report.manifest.totals.delta_bytes == report.plan.nbytes
        ratios.append(report.ratio)
    assert ratios[0] < ratios[1]


def test_a_kl_out_of_reach_is_refused_and_nothing_is_written(made, full, evidence, tmp_path):
    budget = Budget(max_kl=1e-9, candidates=(parse_spec("bitdelta"),))
    with pytest.raises(DeltafoldError) as caught:
        compress_checkpoint(
            made.base,
            full,
            tmp_path / "out",
            recipe=Recipe(budget=budget),
            evidence=evidence,
            judge=CalibratedJudge(evidence),
        )
    assert caught.value.code == "bad-argument"
    assert not any(tmp_path.iterdir())
    with pytest.raises(DeltafoldError) as caught:
        plan_checkpoint(made.base, full, recipe=Recipe(budget=budget))
    assert caught.value.code == "needs-calibration"


def test_a_sketch_has_kl_along_the_frontier(made, full, evidence):
    plan = plan_checkpoint(
        made.base,
        full,
        recipe=Recipe(budget=Budget("30%")),
        evidence=evidence,
        judge=CalibratedJudge(evidence),
    )
    measured = [p for p in plan.frontier if p.kl is not None]
    assert len(measured) >= 5
    assert plan.kl in {p.kl for p in measured}
    assert measured[0].kl > 10 * measured[-1].kl


def test_recording_quality_leaves_the_identity_alone(made, full, data, tmp_path):
    out = tmp_path / "delta"
    compress_checkpoint(made.base, full, out)
    old, before = DeltaRepo.open(out), tree(out)
    found = evaluate_delta(made.base, out, full, data)
    for _ in range(2):
        record_quality(out, found)
    new = DeltaRepo.open(out)
    assert new.digest == old.digest
    assert new.manifest.files == old.manifest.files
    assert verify_delta(out, base=made.base).delta_id == old.digest
    assert new.manifest.quality == found
    assert found["kl_mean"] > 0
    assert 0 < found["top1_agreement"] <= 1
    assert json.loads((out / "report" / "quality.json").read_text()) == found
    assert f"{found['kl_mean']:.4g}" in (out / "README.md").read_text()
    after = tree(out)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"README.md", "delta_config.json", "report/quality.json"}
    record_quality(out, {"note": 1})
    assert DeltaRepo.open(out).manifest.quality == {**found, "note": 1}


def test_only_the_fine_tune_itself_is_a_reference(made, full, data, tmp_path):
    out = tmp_path / "delta"
    compress_checkpoint(made.base, full, out)
    with pytest.raises(DeltafoldError) as caught:
        evaluate_delta(made.base, out, full.parent / "two", data)
    assert caught.value.code == "bad-argument"
    other = make_pair(tmp_path / "other")
    with pytest.raises(DeltafoldError) as caught:
        evaluate_delta(other.base, out, full, data)
    assert caught.value.code == "base-mismatch"


def test_on_a_trained_fine_tune_it_beats_one_codec_for_all(tmp_path):
    """The demo's `reverse`: less KL than the codec of the same size, less still with gradients."""
    demo = Path(deltafold.server.demo.__file__).parent / "data"
    base, tuned = demo / "base", demo / "zoo" / "reverse"
    lines = [
        json.dumps({"prompt": prompt_of(word), "completion": apply("reverse", word)})
        for word in held_out_words(24)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    evidence = calibrate(base, tuned, data, wanted=("gradients",))
    judge = CalibratedJudge(evidence)

    def kl(recipe: Recipe, size: int) -> float:
        report = compress_checkpoint(
            base, tuned, tmp_path / "out", recipe=recipe, judge=judge, overwrite=True
        )
        assert report.manifest.totals.delta_bytes <= size
        return report.manifest.quality["kl_mean"]

    alike = Recipe(default=parse_spec("bitdelta:bits=1,group=64"))
    size = plan_checkpoint(base, tuned, recipe=alike).nbytes
    few = ("bitdelta:bits=1", "bitdelta:bits=1,group=64", "int:bits=4,group=64", "svd:bits=0.5")
    asked = Recipe(budget=Budget(str(size), candidates=tuple(map(parse_spec, few))))
    blind = plan_checkpoint(base, tuned, recipe=asked)
    seeing = plan_checkpoint(base, tuned, recipe=asked, evidence=evidence)
    found = [kl(r, size) for r in (alike, blind.recipe, seeing.recipe)]
    assert found[1] < 0.5 * found[0]
    assert found[2] < 0.5 * found[1]
