"""Any fine-tune of any architecture: every tensor moved, applied or rebuilt, as its dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arch_encoders
import arch_sequences
import arch_table
import pytest
import torch
import transformers
from arch_table import Family

from deltafold.compress import (
    Checkpoint,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
)
from deltafold.compress.fingerprint import digest_source
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.embedded import EmbeddedEngine
from deltafold.runtime.engine import Request, Sampling
from deltafold.runtime.host import Row
from deltafold.runtime.misfit import NotAppliableError
from deltafold.runtime.regions import find_region
from deltafold.runtime.warm_up import later_inputs

LOSSY = Recipe(
    default=parse_spec("bitdelta:bits=2,group=16"),
    overrides=(
        ("*embed*", parse_spec("int:bits=8")),
        ("*down*", parse_spec("dare:drop=0.5")),
        ("*o_proj*", parse_spec("svd:rank=4")),
        ("*out*", parse_spec("svd:rank=4")),
    ),
)
EXACT = Recipe(default=parse_spec("lossless"))


def plain(folder: Path) -> Any:
    """A float32 model as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def fine_tune(family: Family, folder: Path, **saving: Any) -> None:
    """Save a base and a fine-tune of it, every tensor of which differs."""
    model = family.build()
    model.save_pretrained(folder / "base", **saving)
    noise = torch.Generator().manual_seed(1)
    saved = set(model.state_dict())
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point() and name in saved:
                value += torch.randn(value.shape, generator=noise) * 0.05
    model.save_pretrained(folder / "full", **saving)


def pack(folder: Path) -> None:
    """Pack the fine-tune with and without loss; restore both as float32 checkpoints."""
    known = Checkpoint.open(folder / "full").names()
    for name, recipe in (("lossy", LOSSY), ("exact", EXACT)):
        used = [o for o in recipe.overrides if o[0] not in recipe.unused(list(known))]
        chosen = Recipe(default=recipe.default, overrides=tuple(used))
        delta = folder / "zoo" / name
        report = compress_checkpoint(folder / "base", folder / "full", delta, recipe=chosen)
        assert report.coverage == 1
        assert not report.manifest.unchanged, "every tensor was moved"
        restore_checkpoint(delta, folder / "base", folder / name, dtype=torch.float32)


def two_steps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt, and of one more token that is read with the cache of it."""
    with torch.inference_mode():
        first = model(ids, use_cache=True)
        later = later_inputs({"input_ids": ids}, first)
        assert later is not None, "a decoder keeps what it has read"
        return torch.cat([first.logits, model(**later).logits], dim=1)


def mixed(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a batch of base, lossy and exact rows, and of the model before it was wrapped."""
    model = plain(folder / "base")
    alone = two_steps(model, ids)
    deltas = Deltas(model, Checkpoint.open(folder / "base"), folder / "zoo")
    rows = [Row(deltas.acquire(name)) for name in ("base", "lossy", "exact")]
    with deltas.batch(rows):
        return two_steps(model, ids), alone


@pytest.mark.parametrize("family", arch_table.FAMILIES, ids=lambda f: f.name)
def test_every_tensor_is_applied_or_the_variant_rebuilt(family: Family, tmp_path: Path) -> None:
    fine_tune(family, tmp_path)
    pack(tmp_path)
    exact = digest_source(Checkpoint.open(tmp_path / "exact"))
    full = digest_source(Checkpoint.open(tmp_path / "full"))
    assert {n: d.sha256 for n, d in exact.items()} == {n: d.sha256 for n, d in full.items()}
    ids = torch.randint(
        0, arch_table.VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2)
    )
    if family.rebuilt:
        with pytest.raises(NotAppliableError) as caught:
            mixed(tmp_path, ids)
        assert caught.value.code == "engine-unsupported"
        assert caught.value.tensor.endswith(family.rebuilt)
        return
    check(family, tmp_path, ids)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "DeepseekV3"])
def test_experts_that_are_saved_fused(name: str, tmp_path: Path) -> None:
    """As transformers holds them in memory: one tensor of three dimensions a layer."""
    family = next(f for f in arch_table.FAMILIES if f.name == name)
    fine_tune(family, tmp_path, save_original_format=False)
    full = Checkpoint.open(tmp_path / "full")
    fused = [n for n in full.names() if "experts" in n and len(full.spec(n).shape) == 3]
    assert fused
    pack(tmp_path)
    exact = Checkpoint.open(tmp_path / "exact")
    assert all(exact.sha256(n) == full.sha256(n) for n in full.names())
    noise = torch.Generator().manual_seed(2)
    check(family, tmp_path, torch.randint(0, arch_table.VOCABULARY, (3, 7), generator=noise))


def check(family: Family, folder: Path, ids: torch.Tensor) -> None:
    """A mixed batch of three rows, for a prompt and one more token, against the plain and the restored
    dense models.
    """
    got, alone = mixed(folder, ids)
    if family.experts:
        # An expert multiplies the tokens of all requests at once; where those of other rows go
        # changes the shape of that product, and with it the last bits.
        assert (got[0] - alone[0]).abs().max() < 1e-5
    else:
        assert torch.equal(got[0], alone[0])
    for row, name in ((1, "lossy"), (2, "exact")):
        dense = two_steps(plain(folder / name), ids)[row].log_softmax(-1)
        assert (got[row].log_softmax(-1) - dense).abs().max() < 1e-4, name
        moved = (alone[row].log_softmax(-1) - dense).abs().amax(-1)
        assert moved[:-1].max() > 1e-3, name
        assert moved[-1] > 1e-3, f"{name}, later token"


#: One of each kind: transposed products, positions, biases on scores, experts, sinks, short memories.
WITH_ENGINE = [
    "GPT2",
    "OPT",
    "Bloom",
    "Falcon",
    "Qwen3Moe",
    "DeepseekV3",
    "GptOss",
    "Lfm2",
    "Gemma2",
    *(f.name for f in arch_table.FAMILIES if f.rebuilt),
]


@pytest.mark.parametrize("name", WITH_ENGINE)
def test_the_engine_answers_as_dense_models_do(name: str, tmp_path: Path) -> None:
    family = next(f for f in arch_table.FAMILIES if f.name == name)
    fine_tune(family, tmp_path)
    pack(tmp_path)
    noise = torch.Generator().manual_seed(5)
    model = plain(tmp_path / "base")
    deltas = Deltas(model, Checkpoint.open(tmp_path / "base"), tmp_path / "zoo", rebuild="auto")
    requests = []
    for variant, length in (("base", 5), ("lossy", 9), ("exact", 3), ("lossy", 1)):
        prompt = torch.randint(1, arch_table.VOCABULARY, (length,), generator=noise).tolist()
        requests.append(Request(variant, prompt, Sampling(max_tokens=6, ignore_eos=True)))
    with EmbeddedEngine(model, deltas, max_batch=4, prefill_chunk=8) as engine:
        outputs = list(engine.generate(requests))
    for request, output in zip(requests, outputs, strict=True):
        dense = plain(tmp_path / request.variant)
        assert isinstance(request.prompt, list)
        expected = greedy(dense, [int(t) for t in request.prompt], 6)
        assert list(output.token_ids) == expected, request.variant


VOCABULARIES = {"more": 7, "many": 30, "fewer": -9}


def resized(family: Family, folder: Path, name: str, rows: int) -> None:
    """A packed fine-tune with another number of tokens, and its restored dense model."""
    model = plain(folder / "base")
    model.resize_token_embeddings(arch_table.VOCABULARY + rows, mean_resizing=False)
    noise = torch.Generator().manual_seed(abs(rows))
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn(value.shape, generator=noise) * 0.1
    model.save_pretrained(folder / f"{name}-full")
    (folder / f"{name}-full" / "generation_config.json").unlink(missing_ok=True)
    recipe = LOSSY if name == "more" else EXACT
    known = list(Checkpoint.open(folder / f"{name}-full").names())
    used = tuple(o for o in recipe.overrides if o[0] not in recipe.unused(known))
    compress_checkpoint(
        folder / "base",
        folder / f"{name}-full",
        folder / "zoo" / name,
        recipe=Recipe(default=recipe.default, overrides=used),
        accept=["resized"],
    )
    restore_checkpoint(folder / "zoo" / name, folder / "base", folder / name, dtype=torch.float32)


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """What transformers generates for one prompt alone."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma3Text", "GPT2", "Phi", "Cohere"])
def test_vocabularies_of_other_sizes_share_a_batch(name: str, tmp_path: Path) -> None:
    """Tied and untied, scaled embeddings, a head with a bias: each answers as its dense model."""
    family = next(f for f in arch_table.FAMILIES if f.name == name)
    family.build().save_pretrained(tmp_path / "base")
    for variant, rows in VOCABULARIES.items():
        resized(family, tmp_path, variant, rows)
    model = plain(tmp_path / "base")
    prompts = {
        v: [3, arch_table.VOCABULARY - 10 + min(n, 0), 5, 1] for v, n in VOCABULARIES.items()
    }
    prompts["more"][1] = arch_table.VOCABULARY + 6
    prompts["many"][2] = arch_table.VOCABULARY + 29
    prompts["base"] = [7, 8, 9]
    deltas = Deltas(model, Checkpoint.open(tmp_path / "base"), tmp_path / "zoo")
    requests = [
        Request(v, p, Sampling(max_tokens=8, ignore_eos=True, logprobs=2))
        for v, p in prompts.items()
    ]
    with EmbeddedEngine(model, deltas, max_batch=4) as engine:
        outputs = list(engine.generate(requests))
    for request, output in zip(requests, outputs, strict=True):
        dense = plain(tmp_path / request.variant)
        prompt = prompts[request.variant]
        assert list(output.token_ids) == greedy(dense, prompt, 8), request.variant
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            best = dense(ids).logits[0, -1].log_softmax(-1).max()
        assert output.logprobs is not None
        assert abs(output.logprobs[0].logprob - best.item()) < 1e-4, request.variant


def test_the_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "architectures.md"
    assert page.read_text("utf-8") == arch_table.document(), (
        "run: python tests/arch_table.py > docs/architectures.md"
    )


def test_the_readme_counts_them() -> None:
    decoders, encoders = arch_table.FAMILIES, arch_encoders.ENCODERS
    rebuilt = sum(bool(f.rebuilt) for f in (*decoders, *encoders))
    everyone = len(decoders) + len(arch_sequences.SEQUENCES) + len(encoders)
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text("utf-8").split())
    for words in (
        f"all of {len(decoders)} decoder architectures",
        f"{len(arch_sequences.SEQUENCES)} with an encoder or eyes",
        f"{len(encoders)} encoders and vision models",
        f"In {everyone - rebuilt} of these {everyone} its delta is added",
        f"in {rebuilt} it gets a dense model",
    ):
        assert words in readme, words


def test_places_are_found_by_content() -> None:
    """Fused, turned and interleaved parts; copies are told apart by number, or not at all."""
    noise = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(4, 6, 5, generator=noise) for _ in range(3))
    fused = torch.cat([gate, up], dim=1)
    woven = torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2)
    places = [("mlp.experts.gate_up", fused), ("mlp.experts.down", down), ("other.woven", woven)]
    for name, value, slot in (
        ("mlp.experts.2.up_proj.weight", up[2], "mlp.experts.gate_up"),
        ("mlp.experts.3.down_proj.weight", down[3].T, "mlp.experts.down"),
        ("other.woven.1.gate", gate[1], "other.woven"),
    ):
        region = find_region(name, value, places)
        assert region is not None
        assert region.slot == slot
        assert torch.equal(region.of(dict(places)[slot]), value)
    same = [("experts.down", down[:1].expand(4, 6, 5))]
    copy = find_region("experts.2.down", down[0], same)
    assert copy is not None
    assert copy.index == 2
    assert find_region("experts.down_of_all", down[0], same) is None
    assert find_region("experts.2.down", down[0] + 1, same) is None
