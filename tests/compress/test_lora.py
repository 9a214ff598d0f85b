"""A PEFT LoRA as a delta: what comes back is the base with the adapter merged, or a refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from adapters import factors, write_adapter
from checkpoints import base_tensors, bits, read_checkpoint, write_checkpoint

from deltafold.compress import (
    DeltafoldError,
    DeltaRepo,
    compress_checkpoint,
    import_lora,
    restore_checkpoint,
)
from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.lora import cached_lora
from deltafold.compress.terms import LowRank
from deltafold.compress.verify import verify_delta

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
EMBED = "model.embed_tokens"
NORM = "model.norm.weight"


class Bench:
    """A base on disk; `run` imports an adapter and returns the restored float32 tensors."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.root, self.tensors = root, base_tensors(dtype)
        self.base = write_checkpoint(root / "base", self.tensors)
        self.lora, self.out = root / "lora", root / "zoo" / "delta"

    def weight(self, name: str) -> torch.Tensor:
        return self.tensors[name].float()

    def run(self, tensors, *, accept=(), prefix="base_model.model.", **config):
        write_adapter(self.lora, tensors, prefix=prefix, **config)
        import_lora(self.base, self.lora, self.out, accept=accept)
        verify_delta(self.out, base=self.base, full=True)
        restored = self.root / "restored"
        restore_checkpoint(self.out, self.base, restored, dtype=torch.float32, overwrite=True)
        return read_checkpoint(restored)

    def refused(self, code, tensors, words="", **config):
        write_adapter(self.lora, tensors, **config)
        self.refused_as_it_is(code, words)

    def refused_as_it_is(self, code, words=""):
        with pytest.raises(DeltafoldError) as caught:
            import_lora(self.base, self.lora, self.out)
        assert caught.value.code == code, caught.value
        assert words in str(caught.value)
        assert caught.value.fix
        assert not self.out.parent.exists() or not any(self.out.parent.iterdir())


@pytest.fixture
def bench(tmp_path) -> Iterator[Bench]:
    return Bench(tmp_path)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def product(tensors, module):
    return tensors[f"{module}.lora_B.weight"].float() @ tensors[f"{module}.lora_A.weight"].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged(bench, dtype):
    tensors = factors(Q, 40, 40, dtype=dtype) | factors(UP, 72, 40, dtype=dtype, seed=1)
    restored = bench.run(tensors, lora_alpha=12)
    for module in (Q, UP):
        close(
            restored[f"{module}.weight"],
            bench.weight(f"{module}.weight") + 3 * product(tensors, module),
        )
    repo = DeltaRepo.open(bench.out)
    assert set(repo.manifest.tensors) == {f"{Q}.weight", f"{UP}.weight"}
    (term,) = repo.terms(f"{Q}.weight")
    assert term == LowRank(rank=4, factor_format="float32")
    assert repo.entry(f"{Q}.weight").rel_error < 1e-6
    assert repo.manifest.codec_summary() == "lora"
    assert repo.manifest.recipe["default"] == "lora"
    config = json.loads((bench.out / "config.json").read_text())
    assert config == json.loads((bench.base / "config.json").read_text())
    assert not (bench.out / "adapter_config.json").exists()


def test_the_digest_is_that_of_the_merged_tensor(bench):
    tensors = factors(Q, 40, 40)
    bench.run(tensors)
    restored = bench.root / "own"
    restore_checkpoint(bench.out, bench.base, restored)
    merged = read_checkpoint(restored)[f"{Q}.weight"]
    assert merged.dtype == torch.bfloat16
    expected = (bench.weight(f"{Q}.weight") + 2 * product(tensors, Q)).bfloat16()
    assert (merged != expected).float().mean() < 0.01


def test_equal_adapters_give_equal_deltas(bench):
    bench.run(factors(Q, 40, 40))
    first = DeltaRepo.open(bench.out).digest
    import_lora(bench.base, bench.lora, bench.out, overwrite=True)
    assert DeltaRepo.open(bench.out).digest == first


def test_a_step_below_the_rounding_is_kept(bench):
    bench.tensors[f"{Q}.weight"].fill_(1)
    write_checkpoint(bench.base, bench.tensors)
    tensors = factors(Q, 40, 40)
    tensors[f"{Q}.lora_B.weight"] *= 1e-3
    restored = bench.run(tensors)
    repo = DeltaRepo.open(bench.out)
    assert repo.manifest.variant.fingerprint == repo.manifest.base.fingerprint
    assert not torch.equal(restored[f"{Q}.weight"], bench.weight(f"{Q}.weight"))


def test_an_untrained_adapter_is_the_base(bench):
    tensors = factors(Q, 40, 40)
    tensors[f"{Q}.lora_B.weight"].zero_()
    bench.run(tensors)
    assert DeltaRepo.open(bench.out).manifest.tensors == {}


def test_rslora(bench):
    tensors = factors(Q, 40, 40)
    restored = bench.run(tensors, lora_alpha=6, use_rslora=True)
    close(
        restored[f"{Q}.weight"],
        bench.weight(f"{Q}.weight") + 6 / math.sqrt(4) * product(tensors, Q),
    )


def test_patterns(bench):
    tensors = factors(Q, 40, 40, rank=2) | factors(UP, 72, 40, rank=6, seed=1)
    patterns = {"rank_pattern": {"q_proj": 2, r"layers\.\d+\.mlp\.up_proj": 6, "proj": 9}}
    restored = bench.run(tensors, lora_alpha=4, alpha_pattern={"up_proj": 18}, **patterns)
    close(restored[f"{Q}.weight"], bench.weight(f"{Q}.weight") + 2 * product(tensors, Q))
    close(restored[f"{UP}.weight"], bench.weight(f"{UP}.weight") + 3 * product(tensors, UP))


def test_a_rank_above_the_matrix(bench):
    tensors = factors(Q, 40, 40, rank=50) | factors(UP, 72, 40, rank=50, seed=1)
    restored = bench.run(tensors, r=50, lora_alpha=25)
    for module in (Q, UP):
        expected = bench.weight(f"{module}.weight") + 0.5 * product(tensors, module)
        close(restored[f"{module}.weight"], expected)


def test_fan_in_fan_out(bench):
    # The base holds `up` as [in, out] = [72, 40].
    tensors = factors(UP, 40, 72)
    restored = bench.run(tensors, fan_in_fan_out=True)
    close(restored[f"{UP}.weight"], bench.weight(f"{UP}.weight") + 2 * product(tensors, UP).T)


def test_embeddings(bench):
    draw = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 48, generator=draw) * 0.1, torch.randn(40, 4, generator=draw) * 0.1
    tensors = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    restored = bench.run(tensors)
    close(restored[f"{EMBED}.weight"], bench.weight(f"{EMBED}.weight") + 2 * (b @ a).T)
    assert isinstance(DeltaRepo.open(bench.out).terms(f"{EMBED}.weight")[0], LowRank)


def test_convolutions(bench):
    draw = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 3, 3, 3, generator=draw), torch.randn(6, 4, 1, 1, generator=draw)
    module = "model.patch.conv"
    restored = bench.run({f"{module}.lora_A.weight": a * 0.1, f"{module}.lora_B.weight": b * 0.1})
    step = (b.flatten(1) * 0.1 @ a.flatten(1) * 0.1).reshape(6, 3, 3, 3)
    close(restored[f"{module}.weight"], bench.weight(f"{module}.weight") + 2 * step)


@pytest.mark.parametrize("transposed", [False, True])
def test_dora(bench, transposed):
    out, into = (40, 72) if transposed else (72, 40)
    tensors = factors(UP, out, into)
    magnitude = torch.rand(out) + 0.5
    merged = 2 * product(tensors, UP)
    merged = bench.weight(f"{UP}.weight") + (merged.T if transposed else merged)
    norms = merged.norm(dim=0 if transposed else 1, keepdim=True)
    scale = magnitude if transposed else magnitude.unsqueeze(1)
    tensors[f"{UP}.lora_magnitude_vector"] = magnitude
    restored = bench.run(tensors, use_dora=True, fan_in_fan_out=transposed)
    expected = scale * merged / norms
    # Not rounded to the base's bfloat16.
    assert (restored[f"{UP}.weight"] - expected).abs().max() < 2**-20 * expected.abs().max() + 1e-7
    entry = DeltaRepo.open(bench.out).entry(f"{UP}.weight")
    kinds = [term["id"] for term in entry.terms]
    assert kinds == ["lowrank", "codes", "codes", "codes"]
    assert entry.bytes < 3.5 * expected.numel() + 4 * 4 * (out + into)
    assert entry.rel_error < 1e-5


def test_dora_in_float32(tmp_path):
    bench = Bench(tmp_path, torch.float32)
    tensors = factors(Q, 40, 40)
    merged = bench.weight(f"{Q}.weight") + 2 * product(tensors, Q)
    magnitude = torch.rand(40) + 0.5
    tensors[f"{Q}.lora_magnitude_vector.weight"] = magnitude
    restored = bench.run(tensors, use_dora=True)
    close(
        restored[f"{Q}.weight"], magnitude.unsqueeze(1) * merged / merged.norm(dim=1, keepdim=True)
    )


def test_dora_of_an_embedding(tmp_path):
    """The norm is taken over all words, for each feature."""
    bench = Bench(tmp_path, torch.float32)
    a, b, magnitude = torch.randn(4, 48), torch.randn(40, 4), torch.rand(40)
    tensors = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    tensors[f"{EMBED}.lora_magnitude_vector"] = magnitude
    merged = bench.weight(f"{EMBED}.weight") + 2 * (b @ a).T
    restored = bench.run(tensors, use_dora=True)
    close(restored[f"{EMBED}.weight"], magnitude * merged / merged.norm(dim=0))


def test_saved_modules_and_biases(bench):
    head, norm = torch.randn(48, 40), torch.randn(40).bfloat16()
    bias = torch.randn(40).bfloat16()
    tensors = factors(Q, 40, 40)
    tensors |= {"lm_head.weight": head, "model.norm.modules_to_save.weight": norm}
    tensors[f"{Q}.base_layer.bias"] = bias
    restored = bench.run(tensors, modules_to_save=["lm_head", "norm"], bias="all")
    assert bits(restored["lm_head.weight"]) == bits(head)
    assert bits(restored[NORM]) == bits(norm.float())
    assert bits(restored[f"{Q}.bias"]) == bits(bias.float())
    repo = DeltaRepo.open(bench.out)
    assert all(repo.exact(name) for name in ("lm_head.weight", NORM, f"{Q}.bias"))
    assert repo.entry("lm_head.weight").dtype == "F32"


def test_a_saved_copy_of_the_base_is_unchanged(bench):
    tensors = factors(EMBED, 48, 40)
    tensors |= {f"{EMBED}.base_layer.weight": bench.tensors[f"{EMBED}.weight"]}
    bench.run(tensors)
    assert isinstance(DeltaRepo.open(bench.out).terms(f"{EMBED}.weight")[0], LowRank)


def test_a_step_on_a_saved_tensor(bench):
    tensors = factors(Q, 40, 40)
    tensors[f"{Q}.base_layer.weight"] = saved = torch.randn(40, 40)
    restored = bench.run(tensors)
    close(restored[f"{Q}.weight"], saved + 2 * product(tensors, Q))


@pytest.mark.parametrize(
    ("prefix", "cut"), [("base_model.model.", "model."), ("base_model.model.model.", "")]
)
def test_names_with_and_without_model(bench, prefix, cut):
    tensors = factors(Q, 40, 40)
    named = {name.removeprefix(cut): value for name, value in tensors.items()}
    if not cut:
        # The base's own names lack what the adapter's have.
        bench.tensors = {k.removeprefix("model."): v for k, v in bench.tensors.items()}
        write_checkpoint(bench.base, bench.tensors)
        named = {name.removeprefix("model."): value for name, value in tensors.items()}
    restored = bench.run(named, prefix=prefix)
    name = f"{Q}.weight" if cut else f"{Q}.weight".removeprefix("model.")
    close(restored[name], bench.weight(name) + 2 * product(tensors, Q))


def test_tokenizers(bench):
    write_adapter(bench.lora, factors(Q, 40, 40))
    (bench.lora / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
    (bench.lora / "chat_template.jinja").write_text("hello")
    (bench.lora / "train_results.json").write_text("{}")
    (bench.base / "merges.txt").write_text("of the base")
    bench.refused_as_it_is("tokenizer-changed", "--accept tokenizer")
    import_lora(bench.base, bench.lora, bench.out, accept=["tokenizer"])
    names = {p.name for p in bench.out.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= names
    assert not {"merges.txt", "train_results.json"} & names
    assert (bench.out / "chat_template.jinja").read_text() == "hello"


def test_a_new_head(bench):
    tensors = factors(Q, 40, 40) | {"score.weight": torch.randn(2, 40)}
    bench.refused("unexpected-tensor", tensors, "score.weight", modules_to_save=["score"])
    import_lora(bench.base, bench.lora, bench.out, accept=["new-tensors"])
    assert DeltaRepo.open(bench.out).exact("score.weight")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_something_new": True}, "use_something_new"),
        ({"bias": "some"}, "bias"),
    ],
)
def test_options_that_are_not_known(bench, config, words):
    bench.refused("engine-unsupported", factors(Q, 40, 40), words, **config)


@pytest.mark.parametrize(
    ("code", "tensors", "config"),
    [
        ("unexpected-tensor", {f"{Q}.lora_C.weight": torch.ones(1)}, {}),
        ("unexpected-tensor", {f"{Q}.token_adapter.trainable_tokens_delta": torch.ones(1)}, {}),
        ("unexpected-tensor", {"prompt_embeddings": torch.ones(1)}, {}),
        ("unexpected-tensor", factors("model.layers.9.q_proj", 40, 40), {}),
        ("unexpected-tensor", factors(Q.removeprefix("model."), 40, 40), {}),
        ("unexpected-tensor", {"a.modules_to_save.b": torch.ones(1), "a.b": torch.ones(1)}, {}),
        ("coverage", {f"{UP}.lora_A.weight": torch.ones(4, 40)}, {}),
        ("coverage", {f"{UP}.lora_embedding_B": torch.ones(4, 40)}, {}),
        ("coverage", {f"{Q}.lora_magnitude_vector": torch.ones(40)}, {}),
        ("coverage", {}, {"use_dora": True}),
        ("coverage", {}, {"modules_to_save": ["lm_head"]}),
        ("coverage", {"score.weight": torch.ones(2, 40)}, {"modules_to_save": ["score", "norm"]}),
        ("coverage", {}, {"modules_to_save": ["classifier", "score"]}),
        ("shape-mismatch", factors(UP, 40, 72), {}),
        ("shape-mismatch", factors(UP, 72, 40, rank=5), {}),
        ("shape-mismatch", {}, {"r": 5}),
        ("shape-mismatch", {EMBED + ".weight": torch.ones(50, 40)}, {}),
        ("engine-unsupported", factors("model.layers.0.input_layernorm", 40, 1), {}),
        ("not-finite", {f"{Q}.lora_A.weight": torch.full((4, 40), math.nan)}, {}),
        ("not-a-checkpoint", {}, {"r": "4"}),
        ("not-a-checkpoint", {}, {"lora_alpha": None}),
        ("not-a-checkpoint", {}, {"rank_pattern": [1]}),
        ("not-a-checkpoint", {}, {"rank_pattern": {"(": 1}}),
        ("not-a-checkpoint", {}, {"modules_to_save": "lm_head"}),
    ],
)
def test_refusals_leave_nothing(bench, code, tensors, config):
    bench.refused(code, factors(Q, 40, 40) | tensors, **config)


def test_keys_without_the_prefix(bench):
    write_adapter(bench.lora, factors(Q, 40, 40), prefix="")
    bench.refused_as_it_is("unexpected-tensor", "base_model.model.")


def test_files_that_are_missing_or_broken(bench):
    bench.lora.mkdir()
    bench.refused_as_it_is("not-a-checkpoint", "adapter_config.json")
    (bench.lora / "adapter_config.json").write_text("{")
    bench.refused_as_it_is("not-a-checkpoint")
    (bench.lora / "adapter_config.json").write_text("[]")
    bench.refused_as_it_is("not-a-checkpoint")
    (bench.lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    bench.refused_as_it_is("not-a-checkpoint", "download")
    (bench.lora / "adapter_model.bin").write_text("")
    bench.refused_as_it_is("not-a-checkpoint", "save_pretrained")


def test_compress_says_where_loras_go(bench):
    write_adapter(bench.lora, factors(Q, 40, 40))
    with pytest.raises(DeltafoldError) as caught:
        compress_checkpoint(bench.base, bench.lora, bench.out)
    assert "import-lora" in caught.value.fix


def test_the_card_says_that_it_is_a_lora(bench):
    bench.run(factors(Q, 40, 40))
    card = (bench.out / "README.md").read_text()
    assert "base_model_relation: adapter" in card
    assert "A LoRA in " in card


def test_another_run_is_importing_the_same(bench):
    """Two servers that see one LoRA for the first time share what one of them writes."""
    write_adapter(bench.lora, factors(Q, 40, 40))
    base = Checkpoint.open(bench.base)
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(lambda _: cached_lora(base, bench.lora), range(4)))
    assert len(places) == 1
    verify_delta(places.pop(), base=bench.base)


def test_a_tied_embedding(bench):
    config = {"tie_word_embeddings": True, "vocab_size": 48}
    write_checkpoint(bench.base, bench.tensors, config=config)
    a, b = torch.randn(4, 48), torch.randn(40, 4)
    tensors = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    bench.refused("engine-unsupported", tensors, "tied")
    saved = {f"{EMBED}.weight": torch.randn(48, 40)}
    bench.refused("engine-unsupported", saved, "tied", modules_to_save=["embed_tokens"])
    bench.run(saved, modules_to_save=["embed_tokens"], ensure_weight_tying=True)


def test_the_cache_follows_the_content(bench):
    write_adapter(bench.lora, factors(Q, 40, 40))
    base = Checkpoint.open(bench.base)
    first = cached_lora(base, bench.lora)
    assert first.name == bench.lora.name
    assert cached_lora(base, bench.lora) == first
    write_adapter(bench.lora, factors(Q, 40, 40), lora_alpha=3)
    second = cached_lora(base, bench.lora)
    assert second != first
    assert DeltaRepo.open(first).digest != DeltaRepo.open(second).digest
