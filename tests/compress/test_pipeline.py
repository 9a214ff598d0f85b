"""Packing and restoring whole checkpoints."""

from __future__ import annotations

import csv
import json
import os

import pytest
import torch
import yaml
from checkpoints import (
    Pair,
    assert_same,
    base_tensors,
    bits,
    fine_tuned,
    make_pair,
    write_checkpoint,
)
from packing import LOSSLESS, MATRIX, TABLE, pack, restored, tree

from deltafold.compress import (
    DeltafoldError,
    DeltaRepo,
    Progress,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
    verify_delta,
)
from deltafold.compress.terms import Codes, Exact, Lossless, Planes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_lossless_restores_every_bit(tmp_path, dtype):
    pair = make_pair(tmp_path, dtype)
    pair.variant_tensors[MATRIX][0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    write_checkpoint(pair.variant, pair.variant_tensors)
    assert pack(pair, LOSSLESS).lossless
    assert_same(restored(pair), pair.variant_tensors)
    report = verify_delta(pair.out, base=pair.base, full=True)
    assert report.restored == report.coded == len(pair.variant_tensors) - 1


def test_lossless_restores_mixed_dtypes(tmp_path):
    base = base_tensors(torch.float32)
    variant = fine_tuned(base)
    for number, name in enumerate(sorted(base)):
        if base[name].is_floating_point():
            base[name] = base[name].to([torch.bfloat16, torch.float32][number % 2])
            variant[name] = variant[name].to([torch.float16, torch.bfloat16][number // 2 % 2])
    pair = Pair(
        tmp_path,
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "variant", variant),
        base,
        variant,
    )
    pack(pair, LOSSLESS)
    assert_same(restored(pair), variant)


def test_lossless_sees_the_sign_of_a_zero(pair):
    changed = pair.base_tensors[TABLE].clone()
    changed[3] = 0.0
    pair.base_tensors[TABLE] = changed
    write_checkpoint(pair.base, pair.base_tensors)
    negative = changed.clone()
    negative[3, 5] = -0.0
    pair.rewrite(model__embed_tokens__weight=negative)
    pack(pair, LOSSLESS)
    assert bits(restored(pair)[TABLE]) == bits(negative)


def test_large_integers_come_back(pair):
    large = torch.full((8, 4), 2**60)
    pair.base_tensors["counts"] = large
    write_checkpoint(pair.base, pair.base_tensors)
    changed = large + torch.eye(8, 4, dtype=torch.int64)
    pair.rewrite(counts=changed)
    pack(pair)
    assert torch.equal(restored(pair)["counts"], changed)


def test_the_default_recipe(pair):
    repo = pack(pair)
    manifest = repo.manifest
    assert manifest.totals.coverage == 1.0
    assert manifest.unchanged == ("model.position_ids",)
    (matrix,) = repo.terms(MATRIX)
    assert isinstance(matrix, Planes)
    assert (matrix.bits, matrix.group) == (4, 128)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "logit_scale"):
        assert isinstance(repo.terms(name)[0], Exact)
    found = restored(pair)
    for name, value in pair.variant_tensors.items():
        if repo.manifest.tensors.get(name) and not repo.exact(name):
            delta = value.float() - pair.base_tensors[name].float()
            error = (found[name].float() - value.float()).norm() / delta.norm()
            assert error < 0.2, name
            # The file's rounding to bf16 comes on top of what the codec misses.
            assert abs(error - manifest.tensors[name].rel_error) < 0.03
        else:
            assert bits(found[name]) == bits(value), name


def test_restoring_in_another_dtype(pair):
    pack(pair)
    wide = restored(pair, dtype=torch.float32)
    own = restored(pair)
    for name, value in own.items():
        if value.is_floating_point():
            assert wide[name].dtype == torch.float32
            assert torch.equal(wide[name].to(value.dtype), value)
        else:
            assert wide[name].dtype == value.dtype


def test_an_unchanged_fine_tune_costs_no_payload(pair):
    write_checkpoint(pair.variant, pair.base_tensors)
    repo = pack(pair)
    assert repo.manifest.tensors == {}
    assert repo.manifest.totals.payload_bytes == 0
    assert_same(restored(pair), pair.base_tensors)


def test_a_changed_dtype_alone_costs_nearly_nothing(tmp_path):
    base = base_tensors(torch.bfloat16)
    wide = {n: t.float() if t.is_floating_point() else t for n, t in base.items()}
    pair = Pair(
        tmp_path,
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "variant", wide),
        base,
        wide,
    )
    repo = pack(pair)
    assert repo.entry(MATRIX).bytes < 100
    assert_same(restored(pair), wide)


def test_two_runs_give_the_same_bytes(pair, tmp_path):
    first, second = tmp_path / "one" / "sql", tmp_path / "two" / "sql"
    for out in (first, second):
        compress_checkpoint(pair.base, pair.variant, out, command="deltafold compress a b")
    assert tree(first) == tree(second)


def test_sharded_checkpoints_are_the_same_model(pair, tmp_path):
    base = write_checkpoint(tmp_path / "shards" / "base", pair.base_tensors, shards=3)
    variant = write_checkpoint(tmp_path / "shards" / "variant", pair.variant_tensors, shards=2)
    whole, parted = tmp_path / "a", tmp_path / "b"
    compress_checkpoint(pair.base, pair.variant, whole)
    compress_checkpoint(base, variant, parted)
    assert tree(whole) == tree(parted)
    verify_delta(whole, base=base)


def test_a_payload_in_shards(pair, monkeypatch):
    from deltafold.compress import assembly
    from deltafold.compress.shards import ShardWriter

    def small(folder, stem, metadata):
        return ShardWriter(folder, stem, metadata, max_bytes=4000)

    monkeypatch.setattr(assembly, "ShardWriter", small)
    repo = pack(pair, LOSSLESS)
    shards = sorted(path.name for path in pair.out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"delta-00001-of-{len(shards):05}.safetensors"
    index = json.loads((pair.out / "delta.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert "delta.safetensors.index.json" in repo.manifest.files
    assert_same(restored(pair), pair.variant_tensors)
    (pair.out / shards[1]).unlink()
    with pytest.raises(DeltafoldError, match="missing") as caught:
        DeltaRepo.open(pair.out)
    assert caught.value.code == "truncated"


def test_a_restored_checkpoint_in_shards(pair, monkeypatch):
    from deltafold.compress import restore
    from deltafold.compress.checkpoint import Checkpoint
    from deltafold.compress.shards import ShardWriter

    def small(folder, stem, metadata, max_bytes):
        return ShardWriter(folder, stem, metadata, max_bytes=8000)

    monkeypatch.setattr(restore, "ShardWriter", small)
    pack(pair, LOSSLESS)
    assert_same(restored(pair), pair.variant_tensors)
    assert len(Checkpoint.open(pair.root / "restored").files) > 1


def test_a_lossless_delta_stands_for_its_fine_tune(pair, tmp_path):
    archive, small, direct = tmp_path / "archive", tmp_path / "small", tmp_path / "direct"
    compress_checkpoint(pair.base, pair.variant, archive, recipe=LOSSLESS)
    compress_checkpoint(pair.base, archive, small)
    compress_checkpoint(pair.base, pair.variant, direct)
    assert DeltaRepo.open(small).digest == DeltaRepo.open(direct).digest
    one, other = (DeltaRepo.open(p).manifest.variant.fingerprint for p in (small, direct))
    assert one == other


def test_a_lossy_delta_does_not(pair, tmp_path):
    pack(pair)
    with pytest.raises(DeltafoldError, match="lossy") as caught:
        compress_checkpoint(pair.base, pair.out, tmp_path / "again")
    assert caught.value.code == "not-lossless"


def test_last_match_wins(pair):
    recipe = Recipe(
        overrides=(
            ("*", parse_spec("exact")),
            ("*proj*", parse_spec("int:bits=8")),
            (MATRIX, parse_spec("lossless")),
        )
    )
    repo = pack(pair, recipe)
    assert isinstance(repo.terms(MATRIX)[0], Lossless)
    assert isinstance(repo.terms("model.layers.0.mlp.up_proj.weight")[0], Codes)
    assert isinstance(repo.terms("model.patch.conv.weight")[0], Exact)


def test_yaml_is_the_same_as_code(pair, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        """
default: bitdelta:bits=2
vectors: lossless
tensors:
  "*proj*": {codec: int, bits: 8}
  "lm_head*": exact
"""
    )
    same = Recipe(
        default=parse_spec("bitdelta:bits=2"),
        vectors=parse_spec("lossless"),
        overrides=(("*proj*", parse_spec("int:bits=8")), ("lm_head*", parse_spec("exact"))),
    )
    read = Recipe.from_file(path)
    assert read == same
    assert Recipe.from_mapping(read.to_json()) == same
    repo = pack(pair, read)
    assert Recipe.from_mapping(repo.manifest.recipe) == same


def test_the_report_and_the_card(pair):
    report = compress_checkpoint(pair.base, pair.variant, pair.out, command="deltafold compress x")
    assert report.coverage == 1.0
    assert 0 < report.ratio < 2
    name, worst = report.worst(1)[0]
    assert worst == max(e.rel_error for e in report.manifest.tensors.values())
    with (pair.out / "report" / "tensors.csv").open() as file:
        rows = {row["tensor"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(report.manifest.tensors)
    assert int(rows[name]["bytes"]) == report.manifest.tensors[name].bytes
    text = (pair.out / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == ["base"]
    assert head["library_name"] == "deltafold"
    assert "codec-planes" in head["tags"]
    assert "deltafold compress x" in text


def test_sizes_are_what_is_on_the_disk(pair):
    manifest = pack(pair).manifest
    on_disk = {name: len(data) for name, data in tree(pair.out).items()}
    for name, entry in manifest.files.items():
        assert on_disk[name] == entry.bytes
    assert manifest.totals.delta_bytes == sum(e.bytes for e in manifest.files.values())
    assert set(on_disk) - set(manifest.files) == {
        "README.md",
        "delta_config.json",
        "report/bytes.svg",
        "report/error.svg",
        "report/tensors.csv",
    }
    variant = sum(len(bits(t)) for t in pair.variant_tensors.values())
    assert manifest.totals.variant_bytes == variant


def test_every_file_can_be_read_by_others(pair):
    before = os.umask(0o022)
    try:
        pack(pair)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in pair.out.rglob("*") if path.is_file()}
    assert modes == {0o644}


def test_progress_counts_every_tensor(pair):
    events: list[Progress] = []
    pack(pair, progress=events.append)
    for phase, runs in (("pack", 1), ("verify", 1)):
        mine = [event for event in events if event.phase == phase]
        assert len(mine) == sum(1 for e in mine if e.done == e.total) * mine[0].total
        assert sum(1 for e in mine if e.done == e.total) == runs


def test_overwriting_replaces_the_whole_folder(pair):
    first = pack(pair).digest
    (pair.out / "notes.md").write_text("mine")
    second = pack(pair, LOSSLESS, overwrite=True).digest
    assert first != second
    assert "notes.md" not in tree(pair.out)
    assert sorted(path.name for path in pair.out.parent.iterdir()) == ["delta"]


def test_restoring_in_another_dtype_says_so_in_the_configuration(pair, tmp_path):
    config = {"model_type": "pico", "dtype": "bfloat16"}
    write_checkpoint(pair.variant, pair.variant_tensors, config=config)
    pack(pair)
    for dtype, named in ((torch.float32, "float32"), (None, "bfloat16")):
        restore_checkpoint(pair.out, pair.base, tmp_path / named, dtype=dtype)
        found = json.loads((tmp_path / named / "config.json").read_text())
        assert found == {"model_type": "pico", "dtype": named}
