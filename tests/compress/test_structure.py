"""Fine-tunes that are not built quite like their base, and the files beside the weights."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import Pair, assert_same, base_tensors, bits, fine_tuned, write_checkpoint
from packing import LOSSLESS, TABLE, pack, restored, tree

from deltafold.compress import Recipe, parse_spec, verify_delta
from deltafold.compress.terms import Exact, Rows


@pytest.mark.parametrize("spec", ["bitdelta:bits=4", "int", "lossless", "exact", "dare", "svd"])
def test_embeddings_that_changed_in_part_are_rows(pair, spec):
    table = pair.base_tensors[TABLE].clone()
    table[[3, 17, 30]] += 0.25
    pair.rewrite(model__embed_tokens__weight=table)
    repo = pack(pair, Recipe(default=parse_spec(spec)))
    (term,) = repo.terms(TABLE)
    assert isinstance(term, Rows)
    assert term.count == 3
    found = restored(pair)[TABLE]
    untouched = [row for row in range(table.shape[0]) if row not in (3, 17, 30)]
    assert bits(found[untouched]) == bits(table[untouched])
    if repo.exact(TABLE):
        assert bits(found) == bits(table)


@pytest.mark.parametrize("spec", ["bitdelta:bits=2", "int:bits=8", "lossless", "exact", "svd"])
def test_added_rows_come_back_exactly(pair, spec):
    more = torch.cat([pair.variant_tensors[TABLE], torch.randn(5, 40).to(torch.bfloat16)])
    pair.rewrite(model__embed_tokens__weight=more)
    repo = pack(pair, Recipe(default=parse_spec(spec)), accept=["resized"])
    assert repo.manifest.accepted == ("resized",)
    assert repo.entry(TABLE).base_shape == (48, 40)
    found = restored(pair)[TABLE]
    assert found.shape == (53, 40)
    assert bits(found[48:]) == bits(more[48:])
    if repo.exact(TABLE):
        assert bits(found) == bits(more)
    verify_delta(pair.out, base=pair.base, full=True)


def test_only_added_rows(pair):
    table = pair.base_tensors[TABLE]
    more = torch.cat([table, torch.ones(2, 40, dtype=torch.bfloat16)])
    pair.rewrite(model__embed_tokens__weight=more)
    for spec in ("bitdelta", "int", "svd", "dare", "lossless"):
        pack(pair, Recipe(default=parse_spec(spec)), accept=["resized"], overwrite=True)
        assert bits(restored(pair)[TABLE]) == bits(more), spec


def test_a_longer_vector(pair):
    name = "model.layers.0.self_attn.q_proj.bias"
    longer = torch.cat([pair.variant_tensors[name], torch.ones(3, dtype=torch.bfloat16)])
    pair.rewrite(**{name.replace(".", "__"): longer})
    pack(pair, accept=["resized"])
    assert bits(restored(pair)[name]) == bits(longer)


@pytest.mark.parametrize("spec", ["bitdelta:bits=4", "lossless"])
def test_fewer_rows(pair, spec):
    fewer = pair.variant_tensors[TABLE][:40].clone()
    pair.rewrite(model__embed_tokens__weight=fewer)
    pack(pair, Recipe(default=parse_spec(spec)), accept=["resized"])
    found = restored(pair)[TABLE]
    assert found.shape == (40, 40)
    if spec == "lossless":
        assert bits(found) == bits(fewer)


def test_new_tensors_are_exact(pair):
    head = torch.randn(7, 40).to(torch.float16)
    pair.rewrite(score__weight=head, score__scale=torch.tensor(2.0))
    repo = pack(pair, accept=["new-tensors"])
    assert repo.entry("score.weight").base_shape is None
    assert isinstance(repo.terms("score.weight")[0], Exact)
    assert bits(restored(pair)["score.weight"]) == bits(head)
    assert restored(pair)["score.scale"].shape == ()


def test_absent_tensors_are_recorded(pair):
    pair.rewrite(lm_head__weight=None)
    repo = pack(pair, accept=["missing-tensors"])
    assert repo.manifest.absent == ("lm_head.weight",)
    assert repo.manifest.totals.coverage == 1.0
    assert "lm_head.weight" not in restored(pair)
    verify_delta(pair.out, base=pair.base)


def test_tied_in_both_is_simply_one_tensor_less(tmp_path):
    base = {n: t for n, t in base_tensors().items() if n != "lm_head.weight"}
    pair = Pair(
        tmp_path,
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "variant", fine_tuned(base)),
        base,
        fine_tuned(base),
    )
    pack(pair, LOSSLESS)
    assert_same(restored(pair), pair.variant_tensors)


def test_an_accepted_tokenizer_is_packed(pair):
    pair.rewrite(words=("a", "b", "<new>"))
    repo = pack(pair, accept=["tokenizer"])
    assert repo.manifest.accepted == ("tokenizer",)
    restored(pair)
    theirs = (pair.variant / "tokenizer.json").read_bytes()
    assert (pair.out / "tokenizer.json").read_bytes() == theirs
    assert (pair.root / "restored" / "tokenizer.json").read_bytes() == theirs


def test_padding_set_by_the_last_user_is_no_other_tokenizer(pair):
    path = pair.variant / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding": {"length": 8}}))
    assert pack(pair).manifest.accepted == ()


def test_companions_go_along_and_nothing_executable_does(pair):
    (pair.variant / "generation_config.json").write_text("{}")
    (pair.variant / "chat_template.jinja").write_text("{{ messages }}")
    (pair.variant / "additional_chat_templates").mkdir()
    (pair.variant / "additional_chat_templates" / "tool.jinja").write_text("x")
    (pair.variant / "LICENSE").write_text("free")
    (pair.variant / "modeling_evil.py").write_text("import os")
    (pair.variant / "pytorch_model.bin").write_bytes(b"pickle")
    (pair.variant / "adapter_config.json").write_text("{}")
    pack(pair)
    files = set(tree(pair.out))
    assert files == {
        "LICENSE",
        "README.md",
        "additional_chat_templates/tool.jinja",
        "base_tensors.json",
        "chat_template.jinja",
        "config.json",
        "delta.safetensors",
        "delta_config.json",
        "generation_config.json",
        "report/bytes.svg",
        "report/error.svg",
        "report/tensors.csv",
        "tokenizer.json",
    }
    (pair.out / "preprocessor_config.json").write_text("put there later")
    restored(pair)
    again = set(tree(pair.root / "restored"))
    assert again == {
        "LICENSE",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
