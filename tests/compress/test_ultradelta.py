"""UltraDelta: rates by deviation, the drop, and factors by trace norms, step by step."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoints import write_checkpoint
from click.testing import CliRunner

from deltafold.compress import DeltaRepo, Recipe, compress_checkpoint, parse_spec
from deltafold.compress.methods.ultradelta import Spread, mixed_rates
from deltafold.compress.references import compare_with
from deltafold.server.cli.main import cli

#: Standard deviations by tensor; each third of the parameters is one tensor but the last two.
SIZES = {"a": 0.002, "b": 0.001, "c": 0.004, "d": 0.003}
SHAPES = {"a": (96, 128), "b": (96, 128), "c": (48, 128), "d": (48, 128)}


def make(folder, name: str, factor: float = 1.0):
    draw = torch.Generator().manual_seed(0)
    base = {n: torch.randn(shape, generator=draw) * 0.1 for n, shape in SHAPES.items()}
    tuned = {
        n: b + factor * SIZES[n] * torch.randn(b.shape, generator=draw) for n, b in base.items()
    }
    write_checkpoint(folder / "base", base)
    write_checkpoint(folder / name, tuned)
    return folder / "base", folder / name


def packed(base, variant, out, spec: str, **more) -> DeltaRepo:
    recipe = Recipe(default=parse_spec(spec))
    return DeltaRepo.open(compress_checkpoint(base, variant, out, recipe=recipe, **more).out)


def test_rates_by_hand():
    """Nine equal tensors: three and three, and the last three drop what keeps the mean."""
    spreads = [Spread(f"t{i}", 10, float(9 - i)) for i in range(9)]
    rates = mixed_rates(spreads, 0.9, 0.02)
    assert [rates[f"t{i}"] for i in (8, 7, 6)] == [0.9 + 0.02] * 3
    assert [rates[f"t{i}"] for i in (5, 4, 3)] == [0.9] * 3
    assert [rates[f"t{i}"] for i in (2, 1, 0)] == pytest.approx([0.88] * 3)
    # One that straddles the first third counts to the second, as in the released code.
    uneven = mixed_rates([Spread("x", 2, 1.0), Spread("y", 2, 2.0), Spread("z", 1, 3.0)], 0.9, 0.02)
    assert uneven == pytest.approx({"x": 0.9, "y": 0.9, "z": 0.9})
    assert mixed_rates([Spread("alone", 5, 1.0)], 0.9, 0.02) == {"alone": 0.9}
    assert mixed_rates([Spread("a", 8, 1.0), Spread("b", 9, 2.0)], 0.985, 0.01)["b"] <= 0.99
    assert mixed_rates([], 0.9, 0.02) == {}


def test_the_whole_model_decides_the_rate_of_each_tensor(tmp_path):
    base, variant = make(tmp_path, "one")
    repo = packed(base, variant, tmp_path / "out", "ultradelta:drop=0.9,step=0.05")
    zeros = {n: 1 - repo.terms(n)[0].count / math.prod(SHAPES[n]) for n in SHAPES}
    assert zeros["b"] == pytest.approx(0.95, abs=2e-3)
    assert zeros["a"] == pytest.approx(0.9, abs=2e-3)
    assert zeros["c"] == pytest.approx(0.85, abs=2e-3)
    assert zeros["d"] == pytest.approx(0.85, abs=2e-3)
    # All are divided by the global share, not by their own.
    plain = packed(base, variant, tmp_path / "plain", "quantize-and-drop:drop=0.95")
    ours, alone = (r.parts("b")[0].parts["table"] for r in (repo, plain))
    torch.testing.assert_close(ours, alone * (1 - 0.95) / (1 - 0.9), rtol=1e-5, atol=0)
    # The recipe stays what the user wrote.
    assert repo.manifest.recipe["default"] == "ultradelta:drop=0.9,step=0.05"


@pytest.mark.parametrize(("drop", "bits"), [(0.95, 4), (0.97, 4), (0.99, 2)])
def test_bytes_are_close_to_the_entropy_of_mask_and_codes(tmp_path, drop, bits):
    base, variant = make(tmp_path, "one")
    repo = packed(base, variant, tmp_path / "out", f"ultradelta:drop={drop},bits={bits},step=0.005")
    entries = sum(math.prod(shape) for shape in SHAPES.values())
    tables = 4 * 2**bits * len(SHAPES)
    entropy = -(drop * math.log2(drop) + (1 - drop) * math.log2(1 - drop))
    expected = entropy + (1 - drop) * bits
    found = 8 * (repo.manifest.totals.payload_bytes - tables) / entries
    assert expected * 0.9 < found < expected * 1.1


def test_the_larger_of_two_fine_tunes_is_scaled_down_to_the_smaller_one(tmp_path):
    base, one = make(tmp_path, "one")
    _, twice = make(tmp_path, "twice", factor=2.0)
    alone, beside = {}, {}
    for name, folder, other in (("one", one, twice), ("twice", twice, one)):
        spec = "ultradelta:drop=0.8"
        alone[name] = packed(base, folder, tmp_path / f"alone-{name}", spec)
        evidence = compare_with(base, folder, {"task:other": other})
        beside[name] = packed(base, folder, tmp_path / f"beside-{name}", spec, evidence=evidence)
    assert beside["one"].digest == alone["one"].digest
    tables = [r["twice"].parts("a")[0].parts["table"] for r in (beside, alone)]
    # Twice the delta has twice the trace norm.
    torch.testing.assert_close(tables[0], tables[1] * 0.5, rtol=2e-3, atol=0)
    fixed = packed(
        base, twice, tmp_path / "fixed", "ultradelta:drop=0.8,gamma=0.7", evidence=evidence
    )
    table = fixed.parts("a")[0].parts["table"]
    torch.testing.assert_close(table, tables[1] * 0.7, rtol=1e-5, atol=0)


def test_the_factor_is_the_least_norm_over_the_own(tmp_path):
    base, one = make(tmp_path, "one")
    _, other = make(tmp_path, "other", factor=1.3)
    evidence = compare_with(base, other, {"task": one})
    repos = [
        packed(base, one, tmp_path / "a", "ultradelta:drop=0.8"),
        packed(base, other, tmp_path / "b", "ultradelta:drop=0.8"),
    ]
    norms = [
        sum(torch.linalg.svdvals(r.delta(n, torch.zeros(SHAPES[n]))).sum().item() for n in SHAPES)
        for r in repos
    ]
    scaled = packed(base, other, tmp_path / "c", "ultradelta:drop=0.8", evidence=evidence)
    tables = [r.parts("c")[0].parts["table"] for r in (scaled, repos[1])]
    torch.testing.assert_close(tables[0], tables[1] * (norms[0] / norms[1]), rtol=1e-3, atol=0)


def test_other_fine_tunes_are_named_on_the_command_line(tmp_path):
    base, one = make(tmp_path, "one")
    _, twice = make(tmp_path, "twice", factor=2.0)
    _, third = make(tmp_path, "third", factor=1.5)
    args = ["compress", base, twice, "-o", tmp_path / "out", "--codec", "ultradelta", "--json"]
    args += ["--reference", f"task={one}", "--reference", f"task={third}"]
    found = CliRunner().invoke(cli, [str(a) for a in args])
    assert found.exit_code == 0, found.output
    manifest = DeltaRepo.open(tmp_path / "out").manifest
    assert manifest.quality["references"] == {"task:1": "one", "task:2": "third"}
    assert manifest.command.endswith("--reference task=one --reference task=third")
    lone = packed(base, twice, tmp_path / "lone", "ultradelta")
    assert json.loads(found.stdout)["delta_id"] != lone.digest
