"""Budgets, eval and diagnose from the command line."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import deltafold.server.demo
from deltafold.compress import DeltaRepo, Recipe
from deltafold.server.cli.main import cli
from deltafold.server.demo.tasks import apply, held_out_words
from deltafold.server.demo.tokenizer import prompt_of

DEMO = Path(deltafold.server.demo.__file__).parent / "data"


def run(*args, status: int = 0):
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exit_code == status, result.output
    return result


def as_json(*args, status: int = 0):
    return json.loads(run(*args, "--json", status=status).stdout)


def test_options_file_and_dry_run_agree(pair, tmp_path):
    folders = (pair.base, pair.variant)
    asked = ("--target-size", "40%", "--candidates", "int:bits=2", "--candidates", "int:bits=8")
    packed = as_json("compress", *folders, "-o", pair.out, *asked)
    recipe = tmp_path / "budget.yaml"
    budget = {"target_size": "40%", "candidates": ["int:bits=2", "int:bits=8"]}
    recipe.write_text(yaml.safe_dump({"budget": budget}))
    by_file = as_json("compress", *folders, "-o", tmp_path / "file", "--recipe", recipe)
    assert by_file["delta_id"] == packed["delta_id"]
    assert by_file["plan"] == packed["plan"]
    assert " ".join(asked) in DeltaRepo.open(pair.out).manifest.command
    dry = run("compress", *folders, "-o", tmp_path / "none", *asked, "--dry-run").stdout
    assert not (tmp_path / "none").exists()
    assert f"{packed['bytes']:,} bytes" in dry
    assert "chosen" in dry
    # What it prints is a recipe that makes the same delta.
    printed = Recipe.from_mapping(yaml.safe_load(dry.split("recipe:\n\n")[1]))
    assert printed.to_json() == packed["recipe"]
    plan = as_json("compress", *folders, "-o", tmp_path / "none", *asked, "--dry-run")
    assert plan == packed["plan"]
    # An option replaces the goal of the file, and keeps its candidates.
    other = as_json(
        *("compress", *folders, "-o", tmp_path / "none", "--dry-run"),
        *("--recipe", recipe, "--target-size", "70%"),
    )
    assert plan["bytes"] < other["bytes"] < 0.7 * other["variant_bytes"]
    assert set(other["codecs"]) <= {"int:bits=2", "int:bits=8", "exact", "lossless"}


@pytest.mark.parametrize(
    ("args", "code", "fix"),
    [
        (["--target-size", "10%", "--codec", "int"], "bad-argument", "--candidates int"),
        (["--target-size", "10%", "--max-kl", "0.1"], "bad-argument", "--target-size"),
        (["--candidates", "int"], "bad-argument", "--target-size"),
        (["--target-size", "10%", "--candidates", "magic"], "unknown-codec", "deltafold codecs"),
        (["--target-size", "tiny"], "bad-argument", "--target-size 10%"),
        (["--max-kl", "0.1"], "needs-calibration", "--calibrate"),
        (["--target-size", "10%", "--candidates", "svd-act"], "needs-calibration", "--calibrate"),
    ],
)
def test_budgets_that_cannot_be(pair, args, code, fix):
    error = as_json("compress", pair.base, pair.variant, "-o", pair.out, *args, status=2)["error"]
    assert error["code"] == code
    assert fix in error["fix"]
    assert not pair.out.exists()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "title.jsonl"
    lines = [{"prompt": prompt_of(w), "completion": apply("title", w)} for w in held_out_words(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_what_eval_measures_is_shown_wherever_a_delta_is(words, tmp_path):
    base, tuned, delta = DEMO / "base", DEMO / "zoo" / "title", tmp_path / "zoo" / "title"
    packed = as_json("compress", base, tuned, "-o", delta, "--codec", "bitdelta")
    first = ("eval", delta, "--base", base, "--against", tuned, "--data", words)
    looked = as_json(*first, "--dry-run")
    assert as_json("inspect", delta)["quality"] == {}
    found = as_json(*first)
    assert {**found, "recorded": 0, "seconds": 0} == {**looked, "recorded": 0, "seconds": 0}
    assert found["kl_mean"] > 0
    shown = as_json("inspect", delta)
    assert shown["delta_id"] == packed["delta_id"]
    assert shown["quality"]["kl_mean"] == found["kl_mean"]
    assert f"{found['kl_mean']:.4g}" in run("inspect", delta).stdout
    assert "title.jsonl" in run("inspect", delta).stdout
    run("verify", delta, "--base", base)
    wrong = ("eval", delta, "--base", base, "--against", DEMO / "zoo" / "shout", "--data", words)
    assert as_json(*wrong, status=2)["error"]["code"] == "bad-argument"


def test_diagnose_tells_what_breaks_and_draws_it(words, tmp_path):
    page = tmp_path / "report.html"
    asked = ("--codec", "int:bits=8", "--codec", "dare:drop=0.97", "--edit", "scale:by=0.9")
    found = as_json(
        *("diagnose", DEMO / "base", DEMO / "zoo" / "title", "--calibrate", words),
        *(*asked, "--steps", 2, "-o", page, "--group-size", "1MiB"),
    )
    classes = {v["spec"]: v["class"] for v in found["verdicts"]}
    assert classes["int:bits=8"] == "competitive"
    assert classes["dare:drop=0.97"] == "decreased"
    text = page.read_text("utf-8")
    assert text.count("<svg") == len(found["verdicts"])
    assert "model.layers.1.mlp.up_proj.weight" in text
    # Nothing is loaded from elsewhere.
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_codecs_are_classed_where_a_paper_did():
    found = as_json("codecs")
    listed = [*found["codecs"], *found["edits"], *found["merges"]]
    known = {None, "competitive", "decreased", "improved or not"}
    assert {item["class"] for item in listed} <= known
    assert {(i["kind"], i["id"]): i["class"] for i in listed}["codec", "bitdelta"] == "decreased"
    assert re.search(r"^dare .* competitive ", run("codecs").stdout, re.MULTILINE)


@pytest.mark.parametrize("fit", [False, True])
def test_the_report_shows_what_a_budget_weighed_up(words, tmp_path, fit):
    base, tuned, delta = DEMO / "base", DEMO / "zoo" / "title", tmp_path / "title"
    asked = ["--target-size", "12%", "--candidates", "bitdelta", "--candidates", "int:bits=4"]
    if fit:
        asked += ["--calibrate", words, "--fit-scales", "--fit-steps", "1"]
    packed = as_json("compress", base, tuned, "-o", delta, *asked)
    weighed = packed["quality"]["plan"]
    assert weighed["frontier"] == packed["plan"]["frontier"]
    run("report", delta, "-o", tmp_path / "r.html", "--svg-dir", tmp_path / "svg")
    drawn = (tmp_path / "svg" / "frontier.svg").read_text("utf-8")
    shown = [p for p in weighed["frontier"] if "kl" in p] or weighed["frontier"]
    assert drawn.count("<circle") == len(shown) > 5
    for point in shown:
        assert f"{point['bytes'] / packed['variant_bytes']:.2%}" in drawn
    assert ("KL, nats a token" if fit else weighed["error_unit"]) in html.unescape(drawn)
    assert f"{len(weighed['frontier'])} sizes weighed up" in run("inspect", delta).stdout


def test_the_report_shows_the_measured_frontier_of_a_kl(words, tmp_path):
    base, tuned, delta = DEMO / "base", DEMO / "zoo" / "title", tmp_path / "title"
    asked = ("--max-kl", "0.05", "--candidates", "bitdelta", "--candidates", "int:bits=4")
    packed = as_json("compress", base, tuned, "-o", delta, *asked, "--calibrate", words)
    measured = [p for p in packed["quality"]["plan"]["frontier"] if "kl" in p]
    assert len(measured) > 1
    run("report", delta, "-o", tmp_path / "r.html", "--svg-dir", tmp_path / "svg")
    drawn = (tmp_path / "svg" / "frontier.svg").read_text("utf-8")
    assert drawn.count("<circle") == len(measured)
    assert "KL, nats a token" in drawn


def test_sequential_codecs_are_candidates(words, tmp_path):
    folders = (DEMO / "base", DEMO / "zoo" / "title")
    asked = ["--target-size", "11%", "--candidates", "deltazip:bits=2", "--candidates", "bitdelta"]
    asked += ["--calibrate", words, "--calibrate-rows", "4"]
    packed = as_json("compress", *folders, "-o", tmp_path / "title", *asked)
    assert packed["plan"]["codecs"]["deltazip:bits=2"] > 0
    assert packed["bytes"] == packed["plan"]["bytes"] <= 0.11 * packed["variant_bytes"]
    assert packed["quality"]["calibration"]["provides"][-1] == "sequential"
    run("verify", tmp_path / "title", "--base", DEMO / "base")


def test_diagnose_takes_whatever_can_be_packed(words, tmp_path):
    """Codecs that follow the layers before them, and those that look at other checkpoints."""
    shout = DEMO / "zoo" / "shout"
    found = as_json(
        *("diagnose", DEMO / "base", DEMO / "zoo" / "title", "--calibrate", words),
        *("--codec", "deltazip:bits=4", "--codec", "ultradelta:drop=0.5", "--edit", "irr"),
        *("--edit", "trim:keep=0.3", "--steps", 1, "--calibrate-rows", 2),
        *("--reference", f"unaligned={shout}", "--reference", f"task={shout}"),
        *(
            "--edit",
            "safe-delta",
            "--edit",
            "darex-q",
            "--edit",
            "dare-k-gradient",
            "--safe",
            words,
        ),
    )
    labels = {v["spec"]: v["class"] for v in found["verdicts"]}
    edits = {"irr", "trim:keep=0.3", "safe-delta", "darex-q", "dare-k-gradient"}
    assert set(labels) == {"deltazip:bits=4", "ultradelta:drop=0.5"} | edits
    # It judges what packing makes.
    rows = ("--calibrate", words, "--calibrate-rows", 2)
    folders = (DEMO / "base", DEMO / "zoo" / "title", "-o", tmp_path / "packed")
    packed = as_json("compress", *folders, "--codec", "deltazip:bits=4", *rows)
    assert found["verdicts"][0]["kl"] == pytest.approx(packed["quality"]["kl_mean"], rel=1e-3)
    missing = ("diagnose", DEMO / "base", shout, "--calibrate", words, "--edit", "irr")
    fix = as_json(*missing, status=2)["error"]["fix"]
    assert "--reference" in fix
    assert "--safe" in fix
