"""Every command: what it prints, in text and in JSON, and the status it ends with."""

from __future__ import annotations

import json
import shutil

import jsonschema
import pytest
import torch
from adapters import factors, write_adapter
from checkpoints import QUERY, assert_same, read_checkpoint, wide_pair, write_checkpoint
from click.testing import CliRunner
from safetensors.torch import save_file

from deltafold.compress import METHODS, schema, version
from deltafold.compress.spec import written
from deltafold.server.cli.main import cli

BASIC = ("--codec", "bitdelta:bits=2", "--set", "lm_head*=int:bits=8", "--set", "*norm*=lossless")


def run(*args, status: int = 0, env=None):
    result = CliRunner().invoke(cli, [str(a) for a in args], env=env)
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result


def run_json(*args, status: int = 0):
    result = run(*args, "--json", status=status)
    assert result.stdout.count("\n") == 1, result.stdout
    return json.loads(result.stdout)


@pytest.fixture
def packed(pair):
    run("compress", pair.base, pair.variant, "-o", pair.out, *BASIC, "--quiet")
    return pair


def test_compress(pair):
    result = run("compress", pair.base, pair.variant, "-o", pair.out, *BASIC)
    assert "written and verified" in result.stdout
    assert "10 coded, 1 equal to the base's" in result.stdout
    assert "bitdelta:bits=2" in result.stdout
    assert "pack: 11/11 tensors" in result.stderr
    assert "GB/s" in result.stderr


def test_compress_json(pair):
    data = run_json("compress", pair.base, pair.variant, "-o", pair.out, *BASIC)
    assert data["out"] == str(pair.out)
    assert data["delta_id"].startswith("sha256:")
    assert data["coverage"] == 1.0
    assert data["counts"] == {"coded": 10, "unchanged": 1, "absent": 0}
    assert data["bytes"] / data["variant_bytes"] == data["ratio"]
    assert data["recipe"] == {
        "default": "bitdelta:bits=2",
        "vectors": "exact",
        "tensors": {"lm_head*": "int:bits=8", "*norm*": "lossless"},
    }
    assert [set(w) for w in data["worst"]] == [{"tensor", "rel_error"}] * 5
    assert data["peak_memory_bytes"] > 2**20


def test_compress_lossless_says_so(pair):
    result = run("compress", pair.base, pair.variant, "-o", pair.out, "--codec", "lossless")
    assert "bit for bit" in result.stdout


def test_another_prefix_is_a_fact(pair):
    tensors = {f"deep.{name}": value for name, value in pair.variant_tensors.items()}
    write_checkpoint(pair.variant, tensors)
    given = ("compress", pair.base, pair.variant, "-o", pair.out)
    assert "names          'deep.' before the base's names" in run(*given).stdout
    assert "names      'deep.' before the base's names" in run("inspect", pair.out).stdout
    scheme = {"change": "add", "prefix": "deep."}
    assert run_json("inspect", pair.out)["base_names"] == scheme
    back = pair.root / "back"
    data = run_json("compress", pair.variant, pair.base, "-o", back)
    assert data["base_names"] == scheme | {"change": "remove"}
    assert "'deep.' taken from the base's names" in run("inspect", back).stdout
    run("verify", back, "--base", pair.variant, "--full")


def test_against_a_quantised_base(tmp_path):
    pair = wide_pair(tmp_path)
    given = ("compress", pair.base, pair.variant, "-o", pair.out)
    chosen = ("--against", "dequantized", "--base-quantization", "nf4")
    for half in (chosen[:2], chosen[2:]):
        assert run_json(*given, *half, status=2)["error"]["code"] == "bad-argument"
    assert "the base dequantised from nf4 (2 tensors)" in run(*given, *chosen).stdout
    data = run_json("inspect", pair.out)
    assert data["command"].endswith(" ".join(chosen))
    assert data["base_quantization"]["method"] == "nf4"
    assert QUERY in data["base_quantization"]["tensors"]
    assert "against    the base dequantised from nf4 (2 tensors)" in run("inspect", pair.out).stdout
    run("verify", pair.out, "--base", pair.base, "--full")


def test_quiet_and_no_progress(pair):
    result = run("compress", pair.base, pair.variant, "-o", pair.out, "--quiet")
    assert result.stderr == ""
    again = ["compress", pair.base, pair.variant, "-o", pair.out, "--overwrite"]
    assert run(*again, env={"DELTAFOLD_PROGRESS": "0"}).stderr == ""
    assert run(*again).stderr != ""


def test_progress_for_programs(pair):
    result = run("compress", pair.base, pair.variant, "-o", pair.out, "--json")
    steps = [json.loads(line)["progress"] for line in result.stderr.splitlines()]
    packed = [step for step in steps if step["phase"] == "pack"]
    assert [step["done"] for step in packed] == list(range(1, packed[-1]["total"] + 1))
    assert {step["phase"] for step in steps} >= {"pack", "verify"}
    assert len({step["name"] for step in packed}) == len(packed)
    assert packed[-1]["seconds_left"] == 0
    assert all(step["bytes_per_second"] > 0 < step["peak_memory_bytes"] for step in packed)
    assert run("verify", pair.out, "--json", "--quiet").stderr == ""


def test_the_recorded_command_names_no_place_on_this_machine(packed):
    data = run_json("inspect", packed.out)
    assert data["command"] == (
        "deltafold compress base variant -o delta --codec bitdelta:bits=2 "
        "--set 'lm_head*=int:bits=8' --set '*norm*=lossless'"
    )
    everything = b"".join(p.read_bytes() for p in packed.out.rglob("*") if p.is_file())
    assert str(packed.root).encode() not in everything


def test_a_recipe_file_comes_before_options(pair):
    plan = pair.root / "plan.yaml"
    plan.write_text('default: int\ntensors: {"*proj*": exact, "lm_head*": svd}\n')
    options = ["--recipe", plan, "--codec", "bitdelta", "--set", "lm_head*=int:bits=8"]
    data = run_json("compress", pair.base, pair.variant, "-o", pair.out, *options)
    assert data["recipe"]["default"] == "bitdelta"
    assert data["recipe"]["tensors"] == {"*proj*": "exact", "lm_head*": "int:bits=8"}
    assert "--recipe plan.yaml" in run_json("inspect", pair.out)["command"]


def test_options_and_yaml_give_the_same_delta(pair):
    plan = pair.root / "plan.yaml"
    plan.write_text(
        'default: bitdelta:bits=2\ntensors: {"lm_head*": {codec: int, bits: 8}, "*norm*": lossless}'
    )
    one = run_json("compress", pair.base, pair.variant, "-o", pair.out, *BASIC)
    two = run_json("compress", pair.base, pair.variant, "-o", pair.root / "b", "--recipe", plan)
    assert one["delta_id"] == two["delta_id"]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            "shift-scale:vector=(svd:rank=2),rest=(int:bits=2,group=8),shift=0.9",
            '{codec: shift-scale, vector: "svd:rank=2", rest: "int:bits=2,group=8", shift: 0.9}',
        ),
        ("ultradelta:drop=0.8,step=0.05", "{codec: ultradelta, drop: 0.8, step: 0.05}"),
        ("trim:keep=0.3+sparse:bits=4", '"trim:keep=0.3+sparse:bits=4"'),
    ],
)
def test_longer_specs_are_the_same_in_yaml(pair, spec, text):
    plan = pair.root / "plan.yaml"
    plan.write_text(f"default: {text}\nedits: [scale:by=1.1]\n")
    options = ["--codec", spec, "--edit", "scale:by=1.1"]
    one = run_json("compress", pair.base, pair.variant, "-o", pair.out, *options)
    two = run_json("compress", pair.base, pair.variant, "-o", pair.root / "b", "--recipe", plan)
    assert one["delta_id"] == two["delta_id"]
    assert one["recipe"] == two["recipe"]
    assert one["recipe"]["default"] == spec


def test_accept(pair):
    pair.rewrite(score__weight=torch.zeros(2, 40), words=("x", "y"))
    accept = ["--accept", "new-tensors", "--accept", "tokenizer"]
    result = run("compress", pair.base, pair.variant, "-o", pair.out, *accept)
    assert "new-tensors, tokenizer" in result.stdout


def test_inspect(packed):
    text = run("inspect", packed.out).stdout
    for part in ("base  (sha256:", "bitdelta:bits=2", "coverage", "100%", "planes", "codes"):
        assert part in text
    assert "model.norm.weight" not in text
    text = run("inspect", packed.out, "--tensors").stdout
    assert "model.norm.weight" in text
    assert "unchanged" in text


def test_inspect_json(packed):
    data = run_json("inspect", packed.out)
    assert data["kind"] == "delta"
    assert data["base"]["name"] == "base"
    assert data["variant"]["name"] == "variant"
    assert not data["lossless"]
    assert sum(term["tensors"] for term in data["terms"].values()) == 10
    assert sum(term["bytes"] for term in data["terms"].values()) == data["payload_bytes"]
    assert "tensors" not in data
    tensors = run_json("inspect", packed.out, "--tensors")["tensors"]
    assert {t["name"] for t in tensors} == set(packed.variant_tensors)
    assert sum(t["bytes"] for t in tensors) == data["payload_bytes"]


def test_inspect_a_zoo_with_loras(packed):
    zoo, query = packed.out.parent, QUERY.removesuffix(".weight")
    write_adapter(zoo / "small", factors(query, 40, 40))
    write_adapter(zoo / "torn", {f"{query}.lora_A.weight": torch.zeros(4, 40)})
    text = run("inspect", zoo).stdout
    assert ": 1 delta, 1 LoRA, " in text
    assert "LoRA, rank 4" in text
    assert "torn  error[coverage]" in text
    _, small, torn = run_json("inspect", zoo)["deltas"]
    weights = zoo / "small" / "adapter_model.safetensors"
    assert (small["kind"], small["ranks"], small["dora"]) == ("lora", [4], False)
    assert (small["bytes"], small["base"]) == (weights.stat().st_size, {"name": "org/base"})
    assert not torn["ok"]


def test_inspect_a_zoo(packed):
    zoo = packed.out.parent
    shutil.copytree(packed.out, zoo / "broken")
    (zoo / "broken" / "config.json").unlink()
    (zoo / "older").mkdir()
    (zoo / "older" / "delta_config.json").write_text('{"format": "deltafold"}')
    for ignored in ("half.partial", ".hidden"):
        shutil.copytree(packed.out, zoo / ignored)
    (zoo / "notes.txt").write_text("no delta")
    text = run("inspect", zoo).stdout
    assert ": 1 delta, " in text
    assert "broken  error[truncated]" in text
    assert "older  error[bad-manifest]" in text
    data = run_json("inspect", zoo)
    assert data["kind"] == "zoo"
    assert [(d["name"], d["ok"]) for d in data["deltas"]] == [
        ("broken", False),
        ("delta", True),
        ("older", False),
    ]
    assert data["deltas"][0]["error"]["code"] == "truncated"
    assert data["bytes"] == data["deltas"][1]["bytes"]


def test_inspect_what_is_neither(pair):
    assert "error[not-a-delta]" in run("inspect", pair.base, status=3).stderr
    (pair.root / "empty").mkdir()
    assert "error[not-a-delta]" in run("inspect", pair.root / "empty", status=3).stderr


def test_verify(packed):
    result = run("verify", packed.out)
    assert "ok" in result.stdout
    assert "the base was not checked" in result.stdout
    result = run("verify", packed.out, "--base", packed.base, "--full")
    assert "all 11 tensors are accounted for" in result.stdout
    assert "lossy" in result.stdout
    data = run_json("verify", packed.out, "--base", packed.base, "--full")
    assert data["ok"] is True
    assert (data["tensors"], data["coded"], data["base_checked"]) == (11, 10, True)
    assert 0 < data["restored"] < 10


def test_verify_finds_damage(packed):
    path = packed.out / "delta.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    result = run("verify", packed.out, status=3)
    assert result.stdout == ""
    assert "error[checksum]" in result.stderr
    assert "fix: " in result.stderr.splitlines()[-1]
    assert run_json("verify", packed.out, status=3)["error"]["code"] == "checksum"


def test_restore(pair):
    run("compress", pair.base, pair.variant, "-o", pair.out, "--codec", "lossless")
    out = pair.root / "again"
    result = run("restore", pair.out, "--base", pair.base, "-o", out)
    assert "11, of which 11 are the fine-tune's bit for bit" in result.stdout
    assert_same(read_checkpoint(out), pair.variant_tensors)
    assert (
        "error[exists]" in run("restore", pair.out, "--base", pair.base, "-o", out, status=2).stderr
    )
    args = ["restore", pair.out, "--base", pair.base, "-o", out, "--overwrite"]
    data = run_json(*args, "--dtype", "float32")
    assert (data["tensors"], data["dtype"]) == (11, "float32")
    assert read_checkpoint(out)["logit_scale"].dtype == torch.float32


def test_codecs():
    text = run("codecs").stdout
    data = run_json("codecs")
    assert [codec["id"] for codec in data["codecs"]] == sorted(METHODS)
    assert {"id": "planes", "v": 1} in data["terms"]
    bits = {codec["id"]: codec["bits"] for codec in data["codecs"]}
    # A scale a row is 32 bits for 4096 weights; two bits and a position are kept of 2 in 4.
    assert (bits["bitdelta"], bits["nm"], bits["exact"]) == (1.008, 3.004, 16.0)
    for codec in data["codecs"]:
        assert codec["id"] in text
        assert codec["summary"] in text
        assert f"{codec['bits']:.2f}" in text
        for option in codec["options"]:
            assert f"{option['name']}={written(option['default'])}" in text
    lines = text.splitlines()
    for kind in ("codecs", "edits", "families", "merges"):
        for item in data[kind]:
            needs = ", ".join(item["needs"]) or "nothing"
            shown = [item["id"], needs, item["paper"], item["class"] or "-", item["summary"]]
            shown += [item["applied"], f"{item['bits']:.2f}"] if "bits" in item else []
            assert ("bits" in item) == ("applied" in item) == (kind in ("codecs", "families"))
            assert any(all(text in line for text in shown) for line in lines), shown
    shared = {family["id"]: family["bits"] for family in data["families"]}
    # An eighth of 16 bits, of two groups in `row-groups`; a bit, an index a row, or a bit and scales.
    assert shared["emr"] == 1 + 16 / 8
    assert shared["row-groups"] == pytest.approx(2 * 16 / 8, abs=0.01)
    assert shared["shift-scale"] == pytest.approx(1.008 + 16 / 8, abs=0.001)


def test_schema_describes_real_manifests(packed):
    printed = json.loads(run("schema").stdout)
    assert printed == run_json("schema") == schema()
    manifest = json.loads((packed.out / "delta_config.json").read_text("utf-8"))
    jsonschema.validate(manifest, printed)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**manifest, "colour": "red"}, printed)


def test_version():
    assert f"deltafold {version()}\n" in run("version").stdout
    data = run_json("version")
    assert data["deltafold"] == version()
    assert data["torch"] == torch.__version__


@pytest.fixture
def lora(pair):
    folder = pair.root / "lora"
    tensors = factors("model.layers.0.self_attn.q_proj", 40, 40)
    return write_adapter(folder, tensors | {"model.norm.weight": torch.ones(40)})


def test_import_lora(pair, lora):
    text = run("import-lora", pair.base, lora, "-o", pair.out).stdout
    assert "written and verified" in text
    assert "2 coded, 9 equal to the base's" in text
    data = run_json("import-lora", pair.base, lora, "-o", pair.out, "--overwrite")
    assert data["recipe"]["default"] == "lora"
    assert data["coverage"] == 1.0
    shown = run_json("inspect", pair.out)
    assert shown["command"] == "deltafold import-lora base lora -o delta"
    assert shown["codec"] == "lora"
    assert run_json("verify", pair.out, "--base", pair.base, "--full")["ok"]


def test_import_lora_refuses(pair, lora):
    write_adapter(lora, factors("model.nowhere", 40, 40))
    data = run_json("import-lora", pair.base, lora, "-o", pair.out, status=3)
    assert data["error"]["code"] == "unexpected-tensor"
    assert not pair.out.exists()


def test_merge(packed):
    other = packed.root / "out" / "law"
    run("compress", packed.base, packed.variant, "-o", other, "--codec", "int:bits=8", "--quiet")
    deltas, out = (packed.out, other), packed.root / "out" / "both"
    options = ("--base", packed.base, "--method", "ties:keep=0.5", "--weights", "1,2", "--quiet")
    result = run("merge", *deltas, *options, "-o", out, "--codec", "int:bits=8")
    assert "written and verified" in result.stdout
    assert run_json("verify", out, "--base", packed.base)["ok"]
    data = run_json("merge", *deltas, *options, "-o", out, "--companions", 2, "--overwrite")
    assert data["recipe"]["merge"]["method"] == "ties:keep=0.5"
    assert data["recipe"]["merge"]["weights"] == [1.0, 2.0]
    command = run_json("inspect", out)["command"]
    assert command.startswith("deltafold merge delta law --base base --method ties:keep=0.5")
    assert str(packed.root) not in command
    twin = packed.root / "out" / "zoo"
    data = run_json("merge", *deltas, "--base", packed.base, "--method", "twin", "-o", twin)
    assert [d["out"] for d in data["own"]] == [str(twin / "delta"), str(twin / "law")]
    assert len(run_json("inspect", twin)["deltas"]) == 3


def test_export_to_peft(pair, lora):
    run("import-lora", pair.base, lora, "-o", pair.out)
    out = pair.root / "exported"
    options = ["--base", pair.base, "--to", "peft", "-o", out]
    text = run("export", pair.out, *options).stdout
    assert "model.norm.weight" in text
    assert "0.0000 of the whole delta" in text
    data = run_json("export", pair.out, *options, "--overwrite", "--drop", "*norm*")
    assert data["dropped"] == ["model.norm.weight"]
    assert {t["kind"] for t in data["tensors"]} == {"lora", "dropped"}
    assert data["rank"] == 16
    assert (out / "adapter_config.json").is_file()
    text = run("export", pair.out, *options, "--overwrite", "--drop", "*norm*").stdout
    assert "1 tensors, which stay as in the base" in text


def test_export_to_hf_is_restore(packed):
    for name, command in (("a", ["export", "--to", "hf"]), ("b", ["restore"])):
        data = run_json(*command, packed.out, "--base", packed.base, "-o", packed.root / name)
        assert data["tensors"] == 11
    assert_same(read_checkpoint(packed.root / "a"), read_checkpoint(packed.root / "b"))


@pytest.mark.parametrize(
    "options", [("hf", "--rank", "4"), ("hf", "--drop", "x"), ("peft", "--dtype", "float32")]
)
def test_export_options_that_do_not_fit(packed, options):
    out = packed.root / "out2"
    args = ["export", packed.out, "--base", packed.base, "-o", out, "--to", *options]
    assert run_json(*args, status=2)["error"]["code"] == "bad-argument"
    assert not out.exists()


def test_family(pair):
    zoo = pair.root / "zoo"
    data = run_json(
        *("family", pair.base, pair.variant, pair.variant, "-o", zoo),
        *("--method", "row-groups", "--names", "one,two", "--set", "*conv*=int:bits=8"),
    )
    assert data["method"] == "row-groups"
    assert [d["name"] for d in data["deltas"]] == ["one", "two"]
    assert data["bytes"] == data["family_bytes"] + data["delta_bytes"]
    listed = run_json("inspect", zoo)
    assert [f["members"] for f in listed["families"]] == [["one", "two"]]
    assert listed["bytes"] == data["bytes"]
    assert "shared by one, two" in run("inspect", zoo).stdout
    one = run_json("inspect", zoo / "one")
    assert one["families"][0]["family_id"] == data["family_id"]
    assert one["terms"]["shared"]["tensors"] == 5
    shown = run("inspect", zoo / "one").stdout
    assert "once for one, two" in shown
    assert "--method row-groups" in shown
    again = run(
        *("family", pair.base, pair.variant, pair.variant, "-o", zoo, "--names", "one,two"),
        *("--method", "emr", "--overwrite"),
    )
    assert "written and verified" in again.stdout


def test_import_blocks(pair):
    steps = {
        "lm_head.weight.columns.index": torch.tensor([1]),
        "lm_head.weight.columns.values": torch.ones(48, 1),
    }
    path = pair.root / "steps.safetensors"
    save_file(steps, path)
    data = run_json("import-blocks", pair.base, path, "-o", pair.out)
    assert data["counts"] == {"coded": 1, "unchanged": 10, "absent": 0}
    shown = run_json("inspect", pair.out, "--tensors")
    assert shown["terms"] == {"columns(dense)": {"tensors": 1, "bytes": 48 * 4 + 4}}
    assert shown["command"] == "deltafold import-blocks base steps.safetensors -o delta"
