"""Whatever is refused has its own code and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import base_tensors, write_checkpoint
from packing import tree

from deltafold.compress import (
    CODES,
    DeltafoldError,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
    verify_delta,
)
from deltafold.compress.staging import Staging

TABLE = "model.embed_tokens.weight"


@contextmanager
def refused(code: str, *words: str):
    """The block ends in this error, whose text holds the words and ends in a fix."""
    with pytest.raises(DeltafoldError) as caught:
        yield caught
    error = caught.value
    assert error.code == code, str(error)
    assert error.exit_code == CODES[code]
    for word in words:
        assert word in str(error)
    assert error.fix, str(error)


def nothing_left(out: Path) -> bool:
    return not out.parent.exists() or not any(out.parent.iterdir())


def pack(pair, **options):
    return compress_checkpoint(pair.base, pair.variant, pair.out, **options)


def test_unexpected_tensor(pair):
    pair.rewrite(score__weight=torch.zeros(2, 40))
    with refused("unexpected-tensor", "score.weight", "--accept new-tensors"):
        pack(pair)
    assert nothing_left(pair.out)


def test_missing_tensor(pair):
    pair.rewrite(lm_head__weight=None)
    with refused("missing-tensor", "lm_head.weight", "--accept missing-tensors"):
        pack(pair)
    assert nothing_left(pair.out)


def test_more_rows(pair):
    pair.rewrite(model__embed_tokens__weight=torch.zeros(50, 40, dtype=torch.bfloat16))
    with refused("shape-mismatch", TABLE, "[48, 40]", "[50, 40]", "--accept resized"):
        pack(pair)
    assert nothing_left(pair.out)


def test_another_width_is_never_accepted(pair):
    pair.rewrite(model__embed_tokens__weight=torch.zeros(48, 41, dtype=torch.bfloat16))
    with refused("shape-mismatch", TABLE):
        pack(pair, accept=["resized"])
    assert nothing_left(pair.out)


def test_another_rank_is_never_accepted(pair):
    pair.rewrite(logit_scale=torch.zeros(1, dtype=torch.bfloat16))
    with refused("shape-mismatch", "logit_scale"):
        pack(pair, accept=["resized"])


def test_changed_tokenizer(pair):
    pair.rewrite(words=("b", "a"))
    with refused("tokenizer-changed", "tokenizer.json", "--accept tokenizer"):
        pack(pair)
    assert nothing_left(pair.out)


def test_unknown_word_in_accept(pair):
    with pytest.raises(DeltafoldError, match="everything") as caught:
        pack(pair, accept=["everything"])
    assert caught.value.code == "bad-argument"
    assert "new-tensors" in str(caught.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("spec", ["bitdelta", "int", "dare", "svd"])
def test_lossy_codecs_refuse_what_is_not_finite(pair, value, spec):
    table = pair.variant_tensors[TABLE].clone()
    table[2, 3] = float(value)
    pair.rewrite(model__embed_tokens__weight=table)
    with refused("not-finite", TABLE, "=lossless"):
        pack(pair, recipe=Recipe(default=parse_spec(spec)))
    assert nothing_left(pair.out)
    # The fix that the error names works.
    pack(pair, recipe=Recipe(overrides=((TABLE, parse_spec("lossless")),)))
    verify_delta(pair.out, base=pair.base, full=True)


def test_lossy_codecs_refuse_what_overflows(pair):
    huge = torch.full((48, 40), 3e38, dtype=torch.bfloat16)
    pair.rewrite(model__embed_tokens__weight=huge)
    with refused("not-finite", TABLE, "=lossless"):
        pack(pair, recipe=Recipe(default=parse_spec("bitdelta")))
    assert nothing_left(pair.out)


def test_a_pattern_without_a_tensor(pair):
    recipe = Recipe(overrides=(("layers.0.mlp", parse_spec("exact")),))
    with refused("bad-recipe", "layers.0.mlp", "*"):
        pack(pair, recipe=recipe)
    assert nothing_left(pair.out)


def test_existing_out(pair):
    pair.out.mkdir(parents=True)
    with refused("exists", "--overwrite"):
        pack(pair)
    assert sorted(pair.out.parent.iterdir()) == [pair.out]
    assert not any(pair.out.iterdir())


def test_only_deltas_and_checkpoints_are_overwritten(pair):
    pair.out.mkdir(parents=True)
    (pair.out / "thesis.tex").write_text("the only copy")
    with refused("exists", "not replaced"):
        pack(pair, overwrite=True)
    assert (pair.out / "thesis.tex").read_text() == "the only copy"


@pytest.mark.parametrize("place", ["base", "variant", "."])
def test_inputs_are_never_overwritten(pair, place):
    target = pair.root / place
    before = sorted(pair.root.rglob("*"))
    with refused("bad-argument", "reads"):
        compress_checkpoint(pair.base, pair.variant, target, overwrite=True)
    assert sorted(pair.root.rglob("*")) == before


def test_restoring_over_the_delta(pair):
    pack(pair)
    with refused("bad-argument", "reads"):
        restore_checkpoint(pair.out, pair.base, pair.out, overwrite=True)
    verify_delta(pair.out)


@pytest.mark.parametrize("inner", ["inner", "inner/deep"])
def test_an_output_inside_a_delta(pair, inner):
    pack(pair)
    with refused("bad-argument", "inside the delta", "side by side"):
        compress_checkpoint(pair.base, pair.variant, pair.out / inner)
    assert not (pair.out / "inner").exists()


def test_a_file_in_the_way(pair):
    (pair.root / "out").write_text("a file")
    with refused("bad-argument", "cannot be written"):
        pack(pair)
    assert (pair.root / "out").read_text() == "a file"


def test_a_second_run(pair):
    with Staging(pair.out) as first:
        with refused("busy"):
            pack(pair)
        assert first.folder.is_dir()
    assert nothing_left(pair.out)
    pack(pair)


def test_what_a_killed_run_left_is_cleared_away(pair):
    partial = pair.out.with_name("delta.partial")
    partial.mkdir(parents=True)
    (partial / "delta.safetensors").write_bytes(b"half")
    pair.out.with_name(".delta.lock").touch()
    pack(pair)
    assert sorted(pair.out.parent.iterdir()) == [pair.out]
    verify_delta(pair.out, base=pair.base)


def test_out_that_appears_while_the_lock_is_taken(pair, monkeypatch):
    take = Staging._take_lock

    def late(self):
        pair.out.mkdir()
        return take(self)

    monkeypatch.setattr(Staging, "_take_lock", late)
    with refused("exists"):
        pack(pair)
    assert sorted(pair.out.parent.iterdir()) == [pair.out]


def test_disk_full(pair, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("deltafold.compress.shards.write_file", full)
        with refused("not-enough-disk", "delta.partial", "run the same command again"):
            pack(pair)
    assert not pair.out.exists()
    assert pack(pair).resumed == len(pair.variant_tensors)
    assert sorted(pair.out.parent.iterdir()) == [pair.out]


def test_disk_full_while_overwriting_keeps_the_old_delta(pair, monkeypatch):
    pack(pair)
    old = verify_delta(pair.out).delta_id

    def full(*args):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("deltafold.compress.shards.write_file", full)
    recipe = Recipe(default=parse_spec("lossless"))
    with refused("not-enough-disk"):
        pack(pair, recipe=recipe, overwrite=True)
    assert verify_delta(pair.out).delta_id == old


@pytest.mark.parametrize("phase", ["pack", "verify"])
def test_interrupted(pair, phase):
    def stop(event):
        if event.phase == phase and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(pair, progress=stop)
    assert not pair.out.exists()
    report = pack(pair)
    assert report.resumed == (2 if phase == "pack" else len(pair.variant_tensors))
    assert sorted(pair.out.parent.iterdir()) == [pair.out]


def test_interrupted_restore(pair):
    pack(pair)
    out = pair.root / "there" / "restored"

    def stop(event):
        if event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_checkpoint(pair.out, pair.base, out, progress=stop)
    assert nothing_left(out)


def test_a_fine_tune_that_changes_while_it_is_read(pair):
    changed = {n: t + 1 for n, t in pair.variant_tensors.items()}
    other = write_checkpoint(pair.root / "changed", changed) / "model.safetensors"
    weights, recipe = pair.variant / "model.safetensors", Recipe(default=parse_spec("lossless"))
    before = weights.read_bytes()

    def change(event):
        if event.phase == "pack" and event.done == 2:
            with weights.open("r+b") as file:
                file.write(other.read_bytes())

    with refused("input-changed", "model.safetensors", "delta.partial"):
        pack(pair, recipe=recipe, progress=change)
    assert not pair.out.exists()
    # As it is now nothing that was finished is of use; as it was, all of it.
    partial = pair.out.with_name("delta.partial")
    kept = shutil.copytree(partial, pair.root / "kept")
    assert pack(pair, recipe=recipe).resumed == 0
    shutil.rmtree(pair.out)
    shutil.copytree(kept, partial)
    weights.write_bytes(before)
    assert pack(pair, recipe=recipe).resumed == 2
    compress_checkpoint(pair.base, pair.variant, pair.root / "alone", recipe=recipe)
    assert tree(pair.out) == tree(pair.root / "alone")


@pytest.fixture
def other_base(pair):
    """A base that differs in one value of one tensor."""
    tensors = base_tensors()
    tensors["model.norm.weight"][7] += 0.5
    return write_checkpoint(pair.root / "other", tensors)


def test_another_base(pair, other_base):
    pack(pair)
    words = ("base-mismatch", "model.norm.weight (1 of 11)", "sha256:", "base", "other")
    with refused("base-mismatch", *words):
        verify_delta(pair.out, base=other_base)
    out = pair.root / "there" / "restored"
    with refused("base-mismatch", *words):
        restore_checkpoint(pair.out, other_base, out)
    assert nothing_left(out)


def test_a_lossless_delta_of_another_base(pair, other_base):
    pack(pair, recipe=Recipe(default=parse_spec("lossless")))
    out = pair.root / "there" / "again"
    with refused("base-mismatch"):
        compress_checkpoint(other_base, pair.out, out)
    assert nothing_left(out)


def test_full_verification_needs_the_base(pair):
    pack(pair)
    with refused("bad-argument", "--base"):
        verify_delta(pair.out, full=True)


@pytest.mark.parametrize("what", ["/no/such/folder", "./nor/this", "a/b/c", "~/nowhere-at-all"])
def test_not_found(pair, what):
    with refused("not-found", what):
        compress_checkpoint(what, pair.variant, pair.out)
    with refused("not-found", what):
        verify_delta(what)
    assert nothing_left(pair.out)


def test_not_on_the_hub(pair):
    with refused("not-found", "org/there-is-no-such-model"):
        compress_checkpoint("org/there-is-no-such-model@main", pair.variant, pair.out)


def test_hub_ids_need_the_hub(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused("missing-extra", "deltafold[hf]"):
        compress_checkpoint("hf://org/name", pair.variant, pair.out)


def test_base_without_config(pair):
    (pair.base / "config.json").unlink()
    with refused("not-a-checkpoint", "config.json"):
        pack(pair)
    assert nothing_left(pair.out)


def test_base_without_weights(pair):
    (pair.base / "model.safetensors").unlink()
    with refused("not-a-checkpoint", "model.safetensors"):
        pack(pair)


def test_pickled_weights(pair):
    (pair.variant / "model.safetensors").unlink()
    (pair.variant / "pytorch_model.bin").write_bytes(b"pickle")
    with refused("not-a-checkpoint", "convert the pickled weights"):
        pack(pair)
    assert nothing_left(pair.out)


def test_a_missing_shard(pair):
    write_checkpoint(pair.root / "parts", pair.variant_tensors, shards=3)
    (pair.root / "parts" / "model-00002-of-00003.safetensors").unlink()
    with refused("not-a-checkpoint", "model-00002-of-00003.safetensors (1 of 3)"):
        compress_checkpoint(pair.base, pair.root / "parts", pair.out)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_a_broken_index(pair, text):
    (pair.variant / "model.safetensors").unlink()
    (pair.variant / "model.safetensors.index.json").write_text(text)
    with refused("not-a-checkpoint", "index"):
        pack(pair)


def test_a_tensor_in_two_shards(pair):
    folder = write_checkpoint(pair.root / "parts", pair.variant_tensors, shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(DeltafoldError, match="is in both") as caught:
        compress_checkpoint(pair.base, folder, pair.out)
    assert caught.value.code == "not-a-checkpoint"


def test_a_delta_is_no_base(pair):
    pack(pair)
    with refused("not-a-checkpoint", "deltafold restore"):
        compress_checkpoint(pair.out, pair.variant, pair.root / "again")


def test_a_checkpoint_is_no_delta(pair):
    with refused("not-a-delta", "deltafold compress"):
        verify_delta(pair.variant)


def test_a_single_file_wins_over_an_old_index(pair):
    # As transformers does it.
    stale = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (pair.variant / "model.safetensors.index.json").write_text(json.dumps(stale))
    pack(pair)


def test_a_tokenizer_that_is_not_json(pair):
    (pair.variant / "tokenizer.json").write_text("{")
    with pytest.raises(DeltafoldError, match=r"tokenizer\.json is not JSON") as caught:
        pack(pair)
    assert caught.value.code == "not-a-checkpoint"
    assert nothing_left(pair.out)
