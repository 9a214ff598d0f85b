"""Bare bases and fine-tunes with a head, and the other way round: small deltas, served as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arch_table
import numpy as np
import pico
import pooling_zoo
import pytest
import torch
import transformers
from arch_encoders import _PICTURE, _TEXT
from safetensors.torch import load_file, save_file
from truth import greedy, moved

from deltafold.compress import (
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    dtypes,
    parse_spec,
    verify_delta,
)
from deltafold.compress.manifest import BaseNames
from deltafold.compress.restore import restore_checkpoint
from deltafold.runtime import EmbeddedEngine, PoolingEngine, PoolRequest, Request, Sampling
from deltafold.runtime.embedded.opening import open_model

SAMPLING = Sampling(max_tokens=8, ignore_eos=True)


def scheme_of(made: pooling_zoo.Made, name: str) -> BaseNames | None:
    return DeltaRepo.open(made.zoo / name).manifest.base_names


def small(made: pooling_zoo.Made, name: str, new: set[str]) -> None:
    """Only tensors that the base has nothing like are stored whole; what is exact comes back."""
    repo = DeltaRepo.open(made.zoo / name)
    entries = repo.manifest.tensors
    assert {n for n, e in entries.items() if e.base_shape is None} == new
    report = verify_delta(made.zoo / name, base=made.base, full=True)
    assert report.restored == sum(repo.exact(n) for n in entries)
    assert repo.lossless or report.restored < len(entries)


def logits(made: pooling_zoo.Made, name: str, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = made.dense(name)(**inputs).logits[0]
    return found


def same(found: Any, expected: torch.Tensor) -> bool:
    return bool((torch.as_tensor(found) - expected).abs().max() < 1e-5)


def test_a_bare_bert_and_its_classifiers(tmp_path: Path) -> None:
    made = pooling_zoo.Made(tmp_path)
    pooling_zoo.save(transformers.BertModel, transformers.BertConfig(**_TEXT), made.base)
    pooling_zoo.tokenizer(made.base)
    made.tune(transformers.BertForSequenceClassification, "exact", "lossless", num_labels=3)
    made.tune(transformers.BertForSequenceClassification, "sign", "bitdelta:bits=2", num_labels=2)
    made.tune(transformers.BertForTokenClassification, "words", "int:bits=8", num_labels=4)
    made.tune(transformers.BertModel, "bare", "lossless")
    for name in ("exact", "sign", "words"):
        assert scheme_of(made, name) == BaseNames(change="add", prefix="bert.")
        small(made, name, {"classifier.weight", "classifier.bias"})
    assert scheme_of(made, "bare") is None
    ids = [2, 9, 4, 7, 3]
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        before = engine.stats().steps
        found = engine.classify([PoolRequest(n, ids) for n in ("exact", "sign")])
        assert engine.stats().steps == before + 1
        (words,) = engine.run([PoolRequest("words", ids)])
        vectors = engine.embed([PoolRequest(n, ids) for n in ("base", "bare")], normalize=False)
        poolers = engine.embed([PoolRequest("exact", ids)], pooling="pooler", normalize=False)
    inputs = torch.tensor([ids])
    for scores in found:
        assert same(scores.logits, logits(made, scores.variant, input_ids=inputs))
    assert same(words.outputs["logits"], logits(made, "words", input_ids=inputs))
    for vector in vectors:
        with torch.inference_mode():
            states = made.dense(vector.variant)(inputs).last_hidden_state[0]
        assert same(vector.vector, states.mean(0))
    with torch.inference_mode():
        pooled = made.dense("exact").bert(inputs).pooler_output[0]
    assert same(poolers[0].vector, pooled)


def test_a_bert_with_a_head_and_bare_fine_tunes(tmp_path: Path) -> None:
    made = pooling_zoo.Made(tmp_path)
    pooling_zoo.save(transformers.BertForMaskedLM, transformers.BertConfig(**_TEXT), made.base)
    pooling_zoo.tokenizer(made.base)
    made.tune(transformers.BertModel, "exact", "lossless")
    made.tune(transformers.BertModel, "sign", "bitdelta:bits=3")
    for name in ("exact", "sign"):
        assert scheme_of(made, name) == BaseNames(change="remove", prefix="bert.")
        small(made, name, {"pooler.dense.weight", "pooler.dense.bias"})
    ids = [2, 9, 4, 7, 3]
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        asked = [PoolRequest(n, ids) for n in ("exact", "sign", "base")]
        for pooling in ("mean", "pooler"):
            found = engine.embed(
                asked[: 2 if pooling == "pooler" else 3], pooling=pooling, normalize=False
            )
            for vector in found[:2]:
                with torch.inference_mode():
                    out = made.dense(vector.variant)(torch.tensor([ids]))
                expected = {
                    "mean": out.last_hidden_state[0].mean(0),
                    "pooler": out.pooler_output[0],
                }
                assert same(vector.vector, expected[pooling]), (vector.variant, pooling)


def test_a_bare_vit_and_its_classifier(tmp_path: Path) -> None:
    made = pooling_zoo.Made(tmp_path)
    pooling_zoo.save(transformers.ViTModel, transformers.ViTConfig(**_PICTURE), made.base)
    pooling_zoo.processor(made.base)
    made.tune(
        transformers.ViTForImageClassification,
        "two",
        "int:bits=8",
        pooling_zoo.processor,
        num_labels=2,
    )
    assert scheme_of(made, "two") == BaseNames(change="add", prefix="vit.")
    small(made, "two", {"classifier.weight", "classifier.bias"})
    assert DeltaRepo.open(made.zoo / "two").manifest.absent == (
        "vit.pooler.dense.bias",
        "vit.pooler.dense.weight",
    )
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(noise).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        (scores,) = engine.classify([PoolRequest("two", noise)])
    assert same(scores.logits, logits(made, "two", pixel_values=pixels))


def pack(folder: Path, name: str, model: Any, codec: str, **options: Any) -> DeltaRepo:
    model.save_pretrained(folder / f"{name}-full")
    delta, recipe = folder / "zoo" / name, Recipe(default=parse_spec(codec))
    compress_checkpoint(folder / "base", folder / f"{name}-full", delta, recipe=recipe, **options)
    restore_checkpoint(delta, folder / "base", folder / name, dtype=torch.float32)
    return DeltaRepo.open(delta)


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generated(folder: Path, **options: Any) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Tokens and descriptions of every variant, all in one batch."""
    prompt = [3, 14, 15, 9, 2, 6]
    opened = open_model(folder / "base", folder / "zoo", device="cpu", **options)
    with EmbeddedEngine(opened.model, opened.deltas) as engine:
        infos = {i.name: i for i in engine.variants() if i.parent}
        outputs = engine.generate([Request(n, prompt, SAMPLING) for n in infos])
        return {o.variant: list(o.token_ids) for o in outputs}, infos


PROMPT = [3, 14, 15, 9, 2, 6]


def test_a_bare_llama_and_fine_tunes_that_write(tmp_path: Path) -> None:
    """The output layer is the fine-tune's own: the base has none."""
    family = arch_table.Family("Llama")
    start = family.build()
    start.model.save_pretrained(tmp_path / "base")
    for seed, (name, codec) in enumerate({"exact": "lossless", "sign": "bitdelta:bits=3"}.items()):
        repo = pack(tmp_path, name, moved(family.build(), seed=seed), codec, accept=["new-tensors"])
        assert repo.manifest.base_names == BaseNames(change="add", prefix="model.")
        new = {n for n, e in repo.manifest.tensors.items() if e.base_shape is None}
        assert new == {"lm_head.weight"}
        verify_delta(repo.folder, base=tmp_path / "base", full=True)
    found, infos = generated(tmp_path)
    for name, tokens in found.items():
        assert infos[name].applied == "delta"
        assert tokens == greedy(plain(tmp_path / name), PROMPT, 8), name


def test_a_prefix_that_no_class_knows(tmp_path: Path) -> None:
    """As compiled or wrapped models are saved; transformers itself would find no tensor in it."""
    start = arch_table.Family("Llama").build()
    start.save_pretrained(tmp_path / "base")
    tuned = moved(arch_table.Family("Llama").build())
    tuned.resize_token_embeddings(100, mean_resizing=False)
    tuned.save_pretrained(tmp_path / "full")
    file = tmp_path / "full/model.safetensors"
    save_file({f"_orig_mod.{n}": v for n, v in load_file(file).items()}, file)
    recipe = Recipe(default=parse_spec("lossless"))
    delta, accept = tmp_path / "zoo/tuned", ["resized"]
    compress_checkpoint(tmp_path / "base", tmp_path / "full", delta, recipe=recipe, accept=accept)
    found, infos = generated(tmp_path)
    assert infos["tuned"].applied == "delta"
    assert found["tuned"] == greedy(tuned.eval(), PROMPT, 8)
    restore_checkpoint(delta, tmp_path / "base", tmp_path / "restored")
    again = load_file(tmp_path / "restored/model.safetensors")
    assert {n: dtypes.sha256(v) for n, v in again.items()} == {
        n: dtypes.sha256(v) for n, v in load_file(file).items()
    }


def test_fine_tunes_that_call_things_differently_mix(tmp_path: Path) -> None:
    """One has the base's names and one a prefix; both have the same added words."""
    start = arch_table.Family("Llama", {"tie_word_embeddings": True}).build()
    start.model.save_pretrained(tmp_path / "base")
    tuned = {}
    for seed, name in enumerate(("sql", "law")):
        model = arch_table.Family("Llama", {"tie_word_embeddings": True}).build()
        model.load_state_dict(start.state_dict())
        model.resize_token_embeddings(100, mean_resizing=False)
        tuned[name] = moved(model, seed=seed)
    pack(tmp_path, "sql", tuned["sql"], "lossless", accept=["resized"])
    pack(tmp_path, "law", tuned["law"].model, "lossless", accept=["resized"])
    opened = open_model(tmp_path / "base", tmp_path / "zoo", device="cpu")
    with EmbeddedEngine(opened.model, opened.deltas) as engine:
        (output,) = engine.generate([Request("sql*0.25+law*0.75", PROMPT, SAMPLING)])
    mean = tuned["sql"].float()
    with torch.no_grad():
        for name, value in mean.named_parameters():
            value.mul_(0.25).add_(tuned["law"].get_parameter(name), alpha=0.75)
    assert list(output.token_ids) == greedy(mean.eval(), PROMPT, 8)


def test_a_decoder_with_its_head_and_a_bare_fine_tune_that_embeds(tmp_path: Path) -> None:
    made = pooling_zoo.Made(tmp_path)
    sizes = {**_TEXT, "num_key_value_heads": 2}
    pooling_zoo.save(transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes), made.base)
    made.tune(transformers.LlamaModel, "search", "lossless")
    assert scheme_of(made, "search") == BaseNames(change="remove", prefix="model.")
    small(made, "search", set())
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        (vector,) = engine.embed(
            [PoolRequest("search", [4, 5, 6])], pooling="last", normalize=False
        )
    with torch.inference_mode():
        states = made.dense("search")(torch.tensor([[4, 5, 6]])).last_hidden_state
    assert same(vector.vector, states[0, -1])


def test_a_bare_gpt2_with_more_words_more_places_and_a_quantised_base(tmp_path: Path) -> None:
    """Applied, rebuilt, and beside a quantised base; every tensor of the base has a partner."""
    sizes = {**arch_table._GPT, "n_embd": 64, "n_inner": 128}
    start = arch_table.Family("GPT2", {}, sizes).build()
    start.transformer.save_pretrained(tmp_path / "base")
    add = BaseNames(change="add", prefix="transformer.")

    def tuned(seed: int, **changes: Any) -> Any:
        model = arch_table.Family("GPT2", changes, sizes).build()
        state = {n: v for n, v in start.state_dict().items() if "wpe" not in n}
        model.load_state_dict(state, strict=False)
        return moved(model, seed=seed)

    more = tuned(1)
    more.resize_token_embeddings(pico.VOCABULARY + 4, mean_resizing=False)
    for name, model, options in (
        ("exact", tuned(2), {}),
        ("mended", tuned(3), {"base_quantization": "int8"}),
        ("more", more, {"accept": ["resized"]}),
        ("longer", tuned(4, n_positions=80), {"accept": ["resized"]}),
    ):
        repo = pack(tmp_path, name, model, "lossless", **options)
        assert repo.manifest.base_names == add
        assert all(e.base_shape for e in repo.manifest.tensors.values())
        verify_delta(repo.folder, base=tmp_path / "base", full=True)
    found, infos = generated(tmp_path, base_quantization="int8")
    assert {n: i.applied for n, i in infos.items()} == {
        "exact": "delta",
        "longer": "rebuilt",
        "mended": "delta",
        "more": "delta",
    }
    assert infos["longer"].obstacle == "transformer.wpe.weight"
    # What repairs the quantisation, and what has a model of its own, is the fine-tune itself.
    for name in ("mended", "longer"):
        assert found[name] == greedy(plain(tmp_path / name), PROMPT, 8), name
    for path in sorted((tmp_path / "zoo/mended").iterdir(), reverse=True):
        if path.is_file():
            path.unlink()
    found, _ = generated(tmp_path)
    assert sorted(found) == ["exact", "longer", "more"]
    for name, tokens in found.items():
        assert tokens == greedy(plain(tmp_path / name), PROMPT, 8), name


@pytest.mark.parametrize("kept", [True, False])
def test_two_towers_of_one_base_are_stored_as_before(tmp_path: Path, kept: bool) -> None:
    """Which of two copies is meant cannot be told."""
    base = arch_table.Family("Llama").build()
    base.model.save_pretrained(tmp_path / "base")

    class Two(transformers.LlamaPreTrainedModel):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.query = transformers.LlamaModel(config)
            if kept:
                self.passage = transformers.LlamaModel(config)

    Two(base.config).save_pretrained(tmp_path / "two")
    accept = ["new-tensors", "missing-tensors"]
    compress_checkpoint(tmp_path / "base", tmp_path / "two", tmp_path / "delta", accept=accept)
    manifest = DeltaRepo.open(tmp_path / "delta").manifest
    if kept:
        assert manifest.base_names is None
        assert len(manifest.absent) == len(base.model.state_dict())
    else:
        assert manifest.base_names == BaseNames(change="add", prefix="query.")
        assert manifest.absent == ()
