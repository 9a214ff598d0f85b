"""The benchmarks run, and what they report is what they should find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_quality_benchmark_runs(tmp_path):
    """Takes seconds: it packs and runs real models in a process of its own."""
    out = tmp_path / "quality.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "quality.py", "--quick", "--json", out],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = {row["spec"]: row for row in found["rows"]}
    assert rows["no delta"]["accuracy"] < 0.1
    assert rows["bitdelta:bits=4"]["accuracy"] > 0.9
    assert rows["bitdelta:bits=4"]["kl"] < rows["bitdelta:bits=1"]["kl"] < rows["no delta"]["kl"]
    assert rows["bitdelta:bits=1"]["bits"] < rows["bitdelta:bits=4"]["bits"]
    assert all(shape["held"] == shape["tried"] > 0 for shape in found["shapes"])
    assert "| codec `bitdelta:bits=4` |" in done.stdout


@pytest.mark.slow
def test_packing_at_a_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "compress.json"
    script = ROOT / "benchmarks" / "compress.py"
    codecs = ["--codec", "bitdelta", "--codec", "lossless"]
    tiny = ["--layers", "1", "--vocabulary", "256", "--narrower", "32", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *tiny, *codecs, "--jobs", "2", "--json", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text("utf-8"))
    assert found["factor"] == pytest.approx(8030261248 / found["parameters"])
    assert found["bytes_read"] > 4 * found["parameters"]
    packing = found["packing"]
    # Deltas have headers and manifests beside their codes, which count at this size.
    assert packing["bitdelta"]["ratio"] < packing["lossless"]["ratio"] < 0.5
    assert 0.1 < found["coders"]["lossless"]["ratio"] < found["coders"]["zstd"]["ratio"] < 0.9
    for row in packing.values():
        assert row["speed_over_hashing"] == found["hash_seconds"] / row["seconds"]
        assert row["predicted_seconds"] > 0
        assert 0 < row["peak_bytes"] < 2**31
    assert "of hashing speed" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")
def test_kernels_on_tiny_layers(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    script = ROOT / "benchmarks" / "kernels.py"
    call = [sys.executable, str(script), "--device", "cpu", "--quick", "--variants", "2"]
    # The GPU kernels, interpreted: the same code that a GPU runs.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*call, "--json", str(out), "--plots", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text("utf-8"))["rows"]
    cases = {row["case"] for row in rows}
    assert {"base alone", "base + 1 bit", "base + DARE 99 %", "base + rank 64"} <= cases
    checked = [row for row in rows if row["error"] is not None]
    # Twelve forms and the base's own rows in both layers; a table's rows where it is not merged.
    assert len(checked) == 2 * 13 + 1
    assert all(row["error"] < 1e-5 for row in checked)
    # What is left out says why, and everything else was timed.
    for row in rows:
        assert (row["least"] is not None) != bool(row["note"]), row
    assert "base + BitDelta's public kernel" in done.stdout
    assert "goal 75%" in done.stdout
    plot = (tmp_path / "kernels-tiny.svg").read_text("utf-8")
    assert plot.startswith("<?xml")
    assert "variants in the batch" in plot


CUT_SHORT = """
import sys
sys.path.insert(0, sys.argv[1])
import kernel_forms, kernels

def unchecked(form, setting):
    raise MemoryError("no room for float64")

def unmade(rows):
    raise RuntimeError("no room for this form")

whole = kernels._measure
def cut(head, setting, options):
    if head[1] == "down" and setting.variants == 2:
        raise KeyboardInterrupt  # a run cut short
    return whole(head, setting, options)

kernel_forms._dense_of = unchecked
kernel_forms.FORMS["4 bits"] = lambda setting: unmade
kernels._measure = cut
sys.argv[1:] = sys.argv[2:]
kernels.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")
def test_what_was_measured_before_a_run_was_cut_short_is_kept(tmp_path: Path) -> None:
    """Forms that cannot be made or checked are rows that say why, and the others go on."""
    out = tmp_path / "kernels.json"
    options = ("--device", "cpu", "--quick", "--variants", "1", "2", "--json", str(out))
    forms = ("--forms", "1 bit", "4 bits", "rank 16")
    call = [sys.executable, "-c", CUT_SHORT, str(ROOT / "benchmarks"), *options, *forms]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    assert "KeyboardInterrupt" in done.stderr
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert {(row["layer"], row["variants"]) for row in rows} == {
        ("qkv", 1), ("qkv", 2), ("down", 1)
    }  # fmt: skip
    by_case = {row["case"]: row for row in rows}
    assert by_case["base + 4 bits"]["note"] == "RuntimeError: no room for this form"
    assert by_case["base + 4 bits"]["least"] is None
    assert by_case["base + 1 bit"]["note"].endswith("MemoryError: no room for float64")
    assert by_case["base + rank 16"]["least"] > 0


def interpreted(script: str, *options: str) -> str:
    """What a benchmark prints when the GPU kernels run in Triton's interpreter."""
    call = [sys.executable, str(ROOT / "benchmarks" / script), "--device", "cpu", *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")
def test_a_whole_step_of_a_tiny_model(tmp_path: Path) -> None:
    """It compares a mixed step with one of dense weights by itself."""
    out = tmp_path / "step.json"
    printed = interpreted("decode_step.py", "--rounds", "1", "--json", str(out))
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert [row["case"] for row in rows] == [
        "the base's step",
        "1 bit, one token a variant",
        "base rows, through the mixed path",
    ]
    assert all(row["ms"] > 0 for row in rows)
    assert "largest error" in printed


def test_layers_and_experts_of_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "linear.json"
    printed = interpreted(
        "linear.py", "--size", "96", "--variants", "2", "--rounds", "1", "--json", str(out)
    )
    found = json.loads(out.read_text("utf-8"))
    assert {row["case"] for row in found["rows"]} >= {"base", "dense copies", "bitdelta:bits=1"}
    assert {load["case"] for load in found["loads"]} >= {"bitdelta:bits=1", "int:bits=4,group=128"}
    assert "goal" in printed
    small = (
        "--experts",
        "4",
        "--hidden",
        "32",
        "--inner",
        "16",
        "--variants",
        "2",
        "--rounds",
        "1",
    )
    printed = interpreted("experts.py", *small, "--tokens", "1", "--json", str(out))
    cases = {row["case"] for row in json.loads(out.read_text("utf-8"))["rows"]}
    assert {"base", "packed, bitdelta", "dense delta added in every step"} <= cases


def test_the_cost_of_a_method_is_that_of_a_real_run(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    script = ROOT / "benchmarks" / "method_cost.py"
    kinds = ("--kinds", "codec,family,merge", "--only", "svd,emr,task")
    call = [sys.executable, str(script), "--tiny", *kinds]
    done = subprocess.run(
        [*call, "--folder", str(tmp_path), "--json", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text("utf-8"))
    row, *others = found["rows"]
    assert [(r["kind"], r["spec"], r["note"]) for r in others] == [
        ("family", "emr", ""),
        ("merge", "task", ""),
    ]
    assert (row["spec"], row["needs"], row["note"]) == ("svd:bits=1", "", "")
    # All three layers, as they took little time.
    assert row["share"] == pytest.approx(found["set_bytes"] / 2**30)
    assert 0 < row["cpu_seconds"] < 60
    assert row["peak_bytes"] > row["idle_bytes"] > 2**26
    assert "| codec `svd:bits=1` | 0.0% |" in done.stdout
    assert not list(tmp_path.glob("tmp*"))


def test_the_gpu_script_runs_every_step_and_names_those_that_fail(tmp_path: Path) -> None:
    """With a stand-in for Python that writes down its calls: without a GPU no step can run."""
    stand_in, calls = tmp_path / "python", tmp_path / "calls"
    stand_in.write_text(
        f"""#!/bin/sh
[ "$1" = -c ] && {{ [ -z "$LACKS" ]; exit; }}
[ "$2" = pip ] && {{ echo "pip $PYTHONPATH" >> {calls}; exit; }}
echo "$PYTHONPATH $*" >> {calls}
case "$*" in *linear.py*) exit 3; esac
"""
    )
    stand_in.chmod(0o755)
    (tmp_path / "wheels").mkdir()

    def run(steps: str, **more: str) -> subprocess.CompletedProcess[str]:
        calls.unlink(missing_ok=True)
        given = {"PYTHON": str(stand_in), "STEPS": steps, "WHEELS": str(tmp_path / "wheels")}
        return subprocess.run(
            ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path / "out"],
            capture_output=True, text=True, check=False,
            env={**os.environ, "LACKS": "", **given, **more},
        )  # fmt: skip

    done = run("tests linear step")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "== failed: linear"
    lines = calls.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["-m", "-m", *["benchmarks/" + n for n in (
        "linear.py", "decode_step.py")]]  # fmt: skip
    assert all(line.startswith(str(ROOT / ".dev")) for line in lines)
    # The tests that it names are there.
    named = [word for line in lines for word in line.split() if word.startswith("tests/")]
    assert len(named) > 5
    assert all((ROOT / name).exists() for name in named)
    assert run("step").returncode == 0
    assert run("nothing").returncode == 1
    (tmp_path / "wheels" / "some.whl").touch()
    assert run("step").returncode == 0
    first, second = calls.read_text().splitlines()
    assert first.startswith("pip ")
    assert len(second.split()[0].split(":")) > len(first.split()[1].split(":"))
    lacking = run("step", LACKS="1")
    assert lacking.returncode == 2
    assert "pydantic" in lacking.stderr


def test_the_page_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of docs/quality.md are those of the JSON files, every cost beside its method."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import method_cost
    import quality

    results = ROOT / "benchmarks" / "results"
    found = json.loads((results / "quality.json").read_text("utf-8"))
    cost = json.loads((results / "method-cost.json").read_text("utf-8"))
    page = (ROOT / "docs" / "quality.md").read_text("utf-8")
    table = quality.markdown(found, cost)
    assert table in page
    assert method_cost.markdown(cost) in page
    kinds = {row["kind"] for row in cost["rows"]}
    assert kinds == {"codec", "edit", "family", "merge"}
    for line in table.splitlines():
        if line.partition("`")[0].strip("| ") in kinds:
            assert not line.endswith("- | - |"), f"no cost beside {line}"
