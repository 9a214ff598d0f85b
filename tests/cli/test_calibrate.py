"""`compress` with calibration data, on the demo's models."""

from __future__ import annotations

import json

import pytest
import yaml
from click.testing import CliRunner

from deltafold.compress import DeltaRepo, PackReport
from deltafold.server.cli.main import cli
from deltafold.server.cli.packed import pack_text
from deltafold.server.demo.zoo import data_folder

BASE, VARIANT = data_folder() / "base", data_folder() / "zoo" / "shout"


def compress(*args):
    return CliRunner().invoke(cli, ["compress", *map(str, (BASE, VARIANT, *args)), "--json"])


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "words.jsonl"
    lines = [
        {"prompt": f"{word}>", "completion": word.upper()} for word in ("home", "ship", "tree")
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_data_and_fit_are_recorded(tmp_path, words):
    options = ("--codec", "bitdelta", "--set", "*q_proj*=svd-act:rank=4")
    calibration = ("--calibrate", words, "--calibrate-rows", "2", "--reference", f"aligned={BASE}")
    fit = ("--fit-scales", "--fit-steps", "1", "--fit-lr", "0.001")
    result = compress("-o", tmp_path / "out", *options, *calibration, *fit)
    assert result.exit_code == 0, result.output
    manifest = DeltaRepo.open(tmp_path / "out").manifest
    assert manifest.command == (
        "deltafold compress base shout -o out --codec bitdelta --set '*q_proj*=svd-act:rank=4' "
        "--calibrate words.jsonl --calibrate-rows 2 --reference aligned=base "
        "--fit-scales --fit-steps 1 --fit-lr 0.001"
    )
    calibrated, fitted = manifest.quality["calibration"], manifest.quality["fit"]
    assert (calibrated["data"]["name"], calibrated["data"]["rows"]) == ("words.jsonl", 2)
    assert calibrated["provides"] == ["activations"]
    assert (fitted["steps"], fitted["lr"]) == (1, 0.001)
    assert len(fitted["logit_mse"]) == len(fitted["kl"]) == 2
    assert json.loads(result.stdout)["recipe"]["fit"]["steps"] == 1
    text = pack_text(PackReport(tmp_path / "out", manifest, [], resumed=3), 1.0)
    assert f"KL {fitted['kl'][0]:.4g} before, {fitted['kl'][1]:.4g} after" in text
    assert "3 were done by the run before" in text


def test_jobs_do_not_change_the_bytes(tmp_path, words):
    """One model runs for all tensors, in whatever thread they are coded."""
    options = ("--codec", "svd-act:rank=4", "--calibrate", words, "--calibrate-rows", "2")
    for jobs in ("1", "4"):
        result = compress("-o", tmp_path / jobs, *options, "--jobs", jobs)
        assert result.exit_code == 0, result.output
    shards = sorted(p.name for p in (tmp_path / "1").glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def test_a_recipe_file_says_what_the_options_say(tmp_path, words):
    """Fitting and calibration too: one delta, and its manifest's recipe makes it once more."""
    calibration = ("--calibrate", words, "--calibrate-rows", "2")
    fit = ("--fit-scales", "--fit-steps", "2", "--fit-lr", "0.001")
    codecs = ("--codec", "bitdelta", "--set", "*q_proj*=svd-act:rank=4")
    said = {
        "default": "bitdelta",
        "tensors": {"*q_proj*": "svd-act:rank=4"},
        "fit": {"what": "scales", "steps": 2, "lr": 0.001},
        "calibration": {"file": str(words), "rows": 2},
    }
    file, found = tmp_path / "recipe.yaml", []
    file.write_text(yaml.safe_dump(said))
    for name, options in (
        ("a", (*codecs, *calibration, *fit)),
        ("b", ("--recipe", file)),
        ("c", ("--recipe", tmp_path / "again.yaml", *calibration)),
    ):
        result = compress("-o", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        found.append(DeltaRepo.open(tmp_path / name).manifest)
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(found[0].recipe))
    assert len({manifest.delta_id for manifest in found}) == 1
    assert found[0].recipe == found[1].recipe == found[2].recipe
    # An option comes before what the file says.
    result = compress("-o", tmp_path / "d", "--recipe", file, "--fit-steps", "1")
    assert DeltaRepo.open(tmp_path / "d").manifest.recipe["fit"]["steps"] == 1


def test_safety_edits_look_at_the_aligned_model_on_safe_answers(tmp_path, words):
    """The file of safe answers decides what they do, and the manifest says which it was."""
    other = tmp_path / "safe.jsonl"
    other.write_text('{"prompt": "bomb>", "completion": "no"}\n' * 2)
    found = []
    for name, safe in (("a", words), ("b", other)):
        options = ("--codec", "exact", "--edit", "*layers*=safe-delta:budget=50")
        result = compress("-o", tmp_path / name, *options, "--calibrate", words, "--safe", safe)
        assert result.exit_code == 0, result.output
        found.append(DeltaRepo.open(tmp_path / name).manifest)
    record = found[1].quality["calibration"]
    assert record["provides"] == ["safe-activations"]
    assert (record["safe"]["data"]["name"], record["safe"]["aligned"]) == ("safe.jsonl", "base")
    assert found[0].delta_id != found[1].delta_id


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--codec", "svd-act"], "needs-calibration"),
        (["--edit", "safe-delta", "--calibrate", "WORDS"], "needs-calibration"),
        (["--edit", "safe-delta", "--safe", "WORDS"], "bad-argument"),
        (["--fit-scales"], "needs-calibration"),
        (["--fit-terms"], "needs-calibration"),
        (["--calibrate", "WORDS", "--fit-scales", "--fit-terms"], "bad-argument"),
        (["--calibrate", "WORDS", "--codec", "lossless", "--fit-terms"], "bad-argument"),
        (["--reference", f"aligned={BASE}"], "bad-argument"),
        (["--calibrate", "WORDS", "--reference", "aligned"], "bad-argument"),
        (["--calibrate", "WORDS", "--reference", f"friend={BASE}"], "bad-argument"),
        (["--calibrate", "WORDS", "--calibrate-rows", "0"], "bad-argument"),
        (["--calibrate", "WORDS", "--fit-scales", "--fit-steps", "0"], "bad-argument"),
        (["--calibrate", "WORDS", "--fit-scales", "--max-memory", "1KiB"], "not-enough-memory"),
        (["--calibrate", "WORDS", "--codec", "svd-act", "--device", "abacus"], "bad-argument"),
        (["--device", "abacus"], "bad-argument"),
        (["--device", "abacus", "--dry-run"], "bad-argument"),
        (["--calibrate", "nowhere.jsonl"], "not-found"),
    ],
)
def test_mistakes_are_refused_and_leave_nothing(tmp_path, words, options, code):
    given = [words if o == "WORDS" else o for o in options]
    result = compress("-o", tmp_path / "out", *given)
    assert json.loads(result.stdout)["error"]["code"] == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["words.jsonl"]
