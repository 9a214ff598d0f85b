"""Deltas that were cut short, changed by a bit, or written by somebody else."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from checkpoints import make_pair, read_checkpoint

from deltafold.compress import (
    DeltafoldError,
    DeltaRepo,
    Manifest,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
    verify_delta,
)
from deltafold.compress.safetensors_file import SafetensorsFile, write_file
from deltafold.compress.verify import check_coverage

RECIPE = Recipe(
    default=parse_spec("bitdelta:bits=2,group=16"),
    overrides=(
        ("*q_proj.weight", parse_spec("int:bits=4")),
        ("lm_head*", parse_spec("lossless")),
        ("model.norm*", parse_spec("lossless:level=3")),
        ("*up_proj*", parse_spec("dare:drop=0.5")),
        ("*conv*", parse_spec("svd:rank=2")),
    ),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A packed pair that nobody changes."""
    pair = make_pair(tmp_path_factory.mktemp("whole"))
    table = pair.base_tensors["model.embed_tokens.weight"].clone()
    table[[1, 5]] += 0.5
    pair.rewrite(model__embed_tokens__weight=table)
    compress_checkpoint(pair.base, pair.variant, pair.out, recipe=RECIPE)
    return pair


@pytest.fixture
def delta(whole, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(whole.out, tmp_path / "delta")


def code_of(action, *args, **options) -> str:
    with pytest.raises(DeltafoldError) as caught:
        action(*args, **options)
    return caught.value.code


def refuses(whole, delta, code, tmp_path):
    """Verification and restoring end in this code, and restoring leaves nothing."""
    out = tmp_path / "there" / "restored"
    assert code_of(verify_delta, delta, base=whole.base) == code
    assert code_of(restore_checkpoint, delta, whole.base, out) == code
    assert not out.parent.exists() or not any(out.parent.iterdir())


def flip(path, offset: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(bytes(data))


def edit(delta, change, *, sign: bool = True) -> None:
    """Change the manifest; `sign` computes its digest anew, as a forger would."""
    path = delta / "delta_config.json"
    data = json.loads(path.read_text("utf-8"))
    change(data)
    if sign:
        data["delta_id"] = Manifest.model_validate(data).content_digest()
    path.write_text(json.dumps(data), "utf-8")


def test_the_copy_is_sound(whole, delta):
    assert verify_delta(delta, base=whole.base, full=True).coded == 10


def test_a_flipped_bit_in_any_part(whole, delta, tmp_path):
    path = delta / "delta.safetensors"
    entries = SafetensorsFile(path).entries
    kinds = {name.rpartition(".")[2] for name in entries}
    assert kinds >= {"signs", "scales", "scales_unit", "codes", "values", "a", "b", "value"}
    assert kinds >= {"stream0", "stream1", "index", "tables", "states", "words", "low"}
    for number, entry in enumerate(e for e in entries.values() if e.stop > e.start):
        for offset in {entry.start, entry.stop - 1}:
            flip(path, offset, 1 << number % 8)
            assert code_of(verify_delta, delta) == "checksum"
            flip(path, offset, 1 << number % 8)
    flip(path, max(entry.start for entry in entries.values()))
    refuses(whole, delta, "checksum", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "base_tensors.json"])
def test_a_flipped_bit_in_a_small_file(whole, delta, tmp_path, name):
    flip(delta / name, 10)
    refuses(whole, delta, "checksum", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "delta.safetensors"])
def test_a_missing_file(whole, delta, tmp_path, name):
    (delta / name).unlink()
    refuses(whole, delta, "truncated", tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_payload(whole, delta, tmp_path, keep):
    path = delta / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuses(whole, delta, "truncated", tmp_path)


def test_bytes_after_the_payload(whole, delta, tmp_path):
    path = delta / "delta.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    refuses(whole, delta, "truncated", tmp_path)


def test_evidence_may_be_edited(whole, delta):
    (delta / "README.md").write_text("a better card")
    shutil.rmtree(delta / "report")
    verify_delta(delta, base=whole.base)


def test_a_changed_manifest(whole, delta, tmp_path):
    def change(data):
        data["tensors"]["lm_head.weight"]["shape"][0] -= 1

    edit(delta, change, sign=False)
    refuses(whole, delta, "checksum", tmp_path)


@pytest.mark.parametrize(
    ("version", "code"),
    [
        ("2.0", "newer-format"),
        ("10.3", "newer-format"),
        ("0.9", "bad-manifest"),
        ("1", "bad-manifest"),
        ("one", "bad-manifest"),
        ("²", "bad-manifest"),
        ("", "bad-manifest"),
        (None, "bad-manifest"),
    ],
)
def test_format_versions(whole, delta, tmp_path, version, code):
    edit(delta, lambda data: data.update(format_version=version), sign=False)
    refuses(whole, delta, code, tmp_path)


def test_a_later_minor_version_is_read_where_it_can_be(whole, delta):
    edit(delta, lambda data: data.update(format_version="1.7"))
    verify_delta(delta, base=whole.base)
    edit(delta, lambda data: data.update(invented="later"), sign=False)
    assert code_of(verify_delta, delta) == "newer-format"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(colour="red"),
        lambda d: d["base"].update(colour="red"),
        lambda d: d["tensors"]["lm_head.weight"].update(colour="red"),
        lambda d: d["totals"].pop("ratio"),
        lambda d: d.pop("tensors"),
        lambda d: d.update(tensors=[]),
        lambda d: d["tensors"]["lm_head.weight"].update(shape=[-1, 40]),
        lambda d: d["tensors"]["lm_head.weight"].update(sha256="abc"),
        lambda d: d.update(delta_id="abc"),
    ],
)
def test_manifests_that_break_the_schema(delta, change):
    edit(delta, change, sign=False)
    assert code_of(verify_delta, delta) == "bad-manifest"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "bad-manifest"),
        ("{", "bad-manifest"),
        ("[" * 100_000, "bad-manifest"),
        ("[]", "not-a-delta"),
        ("{}", "not-a-delta"),
        ('{"format": "gguf", "format_version": "1.0"}', "not-a-delta"),
    ],
)
def test_manifests_that_are_none(delta, text, code):
    (delta / "delta_config.json").write_text(text)
    assert code_of(verify_delta, delta) == code


def test_no_manifest(delta):
    (delta / "delta_config.json").unlink()
    assert code_of(verify_delta, delta) == "not-a-delta"


def term(data, name="model.layers.0.self_attn.q_proj.weight"):
    return data["tensors"][name]["terms"][0]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: term(d).update(id="waves"), "unknown-codec"),
        (lambda d: term(d).update(v=2), "unknown-codec"),
        (lambda d: term(d).update(bits=8), "bad-manifest"),
        (lambda d: term(d).update(bits=3), "bad-manifest"),
        (lambda d: term(d).update(group=16), "bad-manifest"),
        (lambda d: term(d).update(colour=1), "bad-manifest"),
        (lambda d: term(d).pop("scale_format"), "bad-manifest"),
        (lambda d: term(d, "model.patch.conv.weight").update(rank=10**9), "bad-manifest"),
        (lambda d: term(d, "model.embed_tokens.weight").update(count=3), "bad-manifest"),
        (lambda d: d["tensors"]["logit_scale"].update(dtype="F7"), "bad-manifest"),
        (lambda d: d["tensors"].pop("logit_scale"), "coverage"),
        (lambda d: d["tensors"]["logit_scale"].update(terms=[]), "coverage"),
        (lambda d: d.update(unchanged=[]), "coverage"),
        (lambda d: d["unchanged"].append("what.is.this"), "coverage"),
        (lambda d: d["unchanged"].append("lm_head.weight"), "coverage"),
        (lambda d: d["absent"].append("lm_head.weight"), "coverage"),
        (lambda d: d["files"].pop("delta.safetensors"), "coverage"),
        (lambda d: d["files"].update({"../x": {"bytes": 1}}), "bad-manifest"),
        (lambda d: d["files"].update({"/etc/hostname": {"bytes": 1}}), "bad-manifest"),
        (lambda d: d["files"].update({"more.json": {"bytes": 1}}), "truncated"),
        (lambda d: d["files"].update({"report/x.safetensors": {"bytes": 1}}), "not-found"),
        (lambda d: d["tensors"]["lm_head.weight"].update(base_shape=None), "bad-manifest"),
        (lambda d: d["tensors"]["lm_head.weight"].update(base_shape=[4, 4]), "bad-manifest"),
        (lambda d: d["tensors"]["lm_head.weight"].update(shape=[2**70, 40]), "bad-manifest"),
        (
            lambda d: d["tensors"]["model.embed_tokens.weight"]["shape"].__setitem__(0, 2**40),
            "bad-manifest",
        ),
    ],
)
def test_forged_manifests(whole, delta, tmp_path, change, code):
    edit(delta, change)
    refuses(whole, delta, code, tmp_path)


def test_a_forged_fingerprint_of_the_base(whole, delta):
    edit(delta, lambda d: d["base"].update(fingerprint="sha256:" + "0" * 64))
    assert code_of(verify_delta, delta, base=whole.base) == "bad-manifest"


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": 3}', '{"a": ["F32", 3, "x"]}'])
def test_a_forged_list_of_the_base(whole, delta, text):
    (delta / "base_tensors.json").write_text(text)
    entry = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def change(data):
        data["files"]["base_tensors.json"] = entry
        data["base"]["fingerprint"] = "sha256:" + "0" * 64

    edit(delta, change)
    assert code_of(verify_delta, delta, base=whole.base) == "bad-manifest"


def test_the_same_part_in_two_files(delta):
    shutil.copy(delta / "delta.safetensors", delta / "more.safetensors")
    nbytes = (delta / "more.safetensors").stat().st_size
    edit(delta, lambda d: d["files"].update({"more.safetensors": {"bytes": nbytes}}))
    assert code_of(verify_delta, delta) == "bad-manifest"


def test_a_huge_tensor_made_of_nothing(whole, delta):
    # 2**60 rows of no columns take no bytes; the base says what is possible.
    def change(data):
        entry = data["tensors"]["model.patch.conv.weight"]
        entry.update(shape=[2**60, 0, 3, 3], base_shape=[2**60, 0, 3, 3])

    edit(delta, change)
    assert code_of(verify_delta, delta, base=whole.base) == "bad-manifest"


def test_exactly_stored_tensors_are_checked_on_the_way_out(whole, delta, tmp_path):
    edit(delta, lambda d: d["tensors"]["lm_head.weight"].update(sha256="0" * 64))
    assert code_of(verify_delta, delta, base=whole.base, full=True) == "checksum"
    out = tmp_path / "there" / "restored"
    assert code_of(restore_checkpoint, delta, whole.base, out) == "checksum"
    assert not any(out.parent.iterdir())


def test_coverage_of_a_sound_delta(whole, delta):
    repo = DeltaRepo.open(delta)
    check_coverage(repo, repo.base_tensors)


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def changed(**fields) -> dict:
    return {"a": {**HEADER["a"], **fields}}


@pytest.mark.parametrize(
    ("header", "data", "code"),
    [
        (changed(), 8, None),
        (changed(), 7, "truncated"),
        (changed(), 9, "bad-manifest"),
        (changed(shape=[3]), 8, "bad-manifest"),
        (changed(shape=[-2]), 8, "bad-manifest"),
        (changed(shape=[2.0]), 8, "bad-manifest"),
        (changed(shape=["2"]), 8, "bad-manifest"),
        (changed(shape=2), 8, "bad-manifest"),
        (changed(dtype="F7"), 8, "bad-manifest"),
        (changed(data_offsets=[0]), 8, "bad-manifest"),
        (changed(data_offsets=[8, 0]), 8, "bad-manifest"),
        (changed(data_offsets=[-8, 0]), 8, "bad-manifest"),
        (changed(data_offsets=[0, float("inf")]), 8, "bad-manifest"),
        (changed(data_offsets=[True, 9]), 9, "bad-manifest"),
        (changed(data_offsets=[4, 12]), 12, "bad-manifest"),
        ({**HEADER, "b": HEADER["a"]}, 8, "bad-manifest"),
        ({"a": {}}, 0, "bad-manifest"),
        ({"a": []}, 0, "bad-manifest"),
        ([], 0, "bad-manifest"),
        ({"__metadata__": 3}, 0, "bad-manifest"),
        ('{"a": 1, "a": 2}', 0, "bad-manifest"),
        ("[" * 100_000, 0, "bad-manifest"),
        ("\xff", 0, "bad-manifest"),
    ],
)
def test_headers(tmp_path, header, data, code):
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode("latin-1")
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))
    if code is None:
        assert SafetensorsFile(path).tensor("a").tolist() == [0, 0]
    else:
        assert code_of(SafetensorsFile, path, code="bad-manifest") == code


@pytest.mark.parametrize("head", [b"", b"\x01", b"\xff" * 8, (2**40).to_bytes(8, "little")])
def test_files_that_do_not_begin_like_safetensors(tmp_path, head):
    path = tmp_path / "x.safetensors"
    path.write_bytes(head)
    assert code_of(SafetensorsFile, path) == "not-a-checkpoint"


def test_written_files_are_read_by_the_official_library(tmp_path):
    tensors = {
        "b": torch.arange(3, dtype=torch.uint8),
        "ä": torch.randn(2, 3).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
    }
    write_file(tmp_path / "x.safetensors", tensors, {"z": "1", "a": "2"})
    found = read_checkpoint(tmp_path)
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in tensors.items()
    }
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert SafetensorsFile(tmp_path / "x.safetensors").metadata == {"a": "2", "z": "1"}
