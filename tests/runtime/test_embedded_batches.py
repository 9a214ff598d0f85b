"""Requests written in whole batches: each with its own variant, settings, tokenizer and end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arch_sequences
import numpy as np
import pairs
import pico
import pytest
import torch
import transformers
from arch_sequences import greedy
from pairs import pack, plain
from PIL import Image

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    Recipe,
    compress_checkpoint,
    parse_spec,
)
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.embedded import EmbeddedEngine
from deltafold.runtime.engine import Request, Sampling
from deltafold.runtime.host import Row


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs.t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def engine(made: Path) -> Any:
    with EmbeddedEngine.open(made / "base", zoo=made / "zoo", device="cpu") as opened:
        yield opened


LONG = Sampling(max_tokens=12, ignore_eos=True)
DRAWN = dataclasses.replace(LONG, temperature=1.5, seed=3)


def test_variants_and_vocabularies_share_a_batch(made: Path, engine: EmbeddedEngine) -> None:
    names = ["base", "sign", "exact", "more", "sign"]
    prompts = [f"hello {'the cat ' * i}" for i in range(len(names))]
    steps = engine.stats().steps
    requests = [Request(n, p, LONG) for n, p in zip(names, prompts, strict=True)]
    outputs = list(engine.generate(requests))
    assert engine.stats().steps - steps == 12
    for name, prompt, output in zip(names, prompts, outputs, strict=True):
        ids = torch.tensor([engine.encode(name, prompt)])
        expected = greedy(plain(made / name), {"input_ids": ids}, 12)
        assert list(output.token_ids) == expected, name
        assert output.prompt_tokens == ids.shape[1]
        assert output.text == engine.decode(name, expected)
    assert len({o.token_ids for o in outputs}) > 3


def test_each_request_has_its_own_settings(engine: EmbeddedEngine) -> None:
    """What shares the batch makes no difference; random numbers are a request's own."""
    samplings = {
        "greedy": LONG,
        "drawn": DRAWN,
        "other seed": dataclasses.replace(DRAWN, seed=4),
        "narrow": dataclasses.replace(DRAWN, top_k=2, top_p=0.9),
        "short": dataclasses.replace(DRAWN, max_tokens=3, logprobs=2),
        "scaled": dataclasses.replace(LONG, scale=3.0),
        "none": dataclasses.replace(LONG, max_tokens=0),
    }
    requests = [Request("sign", "hello there", s) for s in samplings.values()]
    together = dict(zip(samplings, engine.generate(requests), strict=True))
    for request, (name, output) in zip(requests, together.items(), strict=True):
        (alone,) = engine.generate([request])
        assert output.token_ids == alone.token_ids, name
    tokens = {name: output.token_ids for name, output in together.items()}
    assert tokens["short"] == tokens["drawn"][:3]
    assert len(tokens["none"]) == 0
    assert len({tokens[n] for n in ("greedy", "drawn", "other seed", "scaled")}) == 4
    (first, *_) = together["short"].logprobs
    assert first.token_id == tokens["short"][0]
    assert len(first.top) == 2


def test_stop_texts_and_end_tokens(made: Path, engine: EmbeddedEngine) -> None:
    (whole,) = engine.generate([Request("exact", "hello", DRAWN)])
    third = whole.token_ids[2]
    first = whole.token_ids.index(third)
    stop = dataclasses.replace(DRAWN, stop_token_ids=(third,))
    text = next(c for c in whole.text if c.isascii())
    by_text = dataclasses.replace(DRAWN, stop=(text,))
    requests = [Request("exact", "hello", s) for s in (stop, by_text, DRAWN)]
    ended, cut, unbounded = engine.generate(requests)
    assert (ended.finish_reason, len(ended.token_ids)) == ("stop", first + 1)
    assert (cut.finish_reason, cut.text) == ("stop", whole.text.split(text)[0])
    assert unbounded.token_ids == whole.token_ids


def test_tokens_come_as_they_are_chosen_and_stop_when_cancelled(engine: EmbeddedEngine) -> None:
    watches = [pico.Watch(), pico.Watch()]
    tickets: list[Any] = []

    def on_chunk(chunk: Any) -> None:
        watches[0](chunk)
        if len(watches[0].tokens) == 3:
            engine.cancel(tickets[0].id)

    with pico.hold(engine):
        pairs: list[tuple[Request, Callable[[Any], None]]] = [
            (Request("sign", "hello", LONG), on_chunk),
            (Request("base", "hello", LONG), watches[1]),
        ]
        tickets += engine.submit_together(pairs)
    assert watches[0].wait().finish_reason == "cancelled"
    assert len(watches[0].tokens) == 3
    assert watches[1].wait().finish_reason == "length"
    assert len(watches[1].chunks) == 12, "one chunk a token"


def test_closing_cuts_a_batch_short(made: Path) -> None:
    model = plain(made / "base")
    deltas = Deltas(model, Checkpoint.open(made / "base"), made / "zoo")
    engine = EmbeddedEngine(model, deltas)
    watch = pico.Watch()

    def on_chunk(chunk: Any) -> None:
        watch(chunk)
        if len(watch.chunks) == 2:
            engine.close()

    engine.submit(Request("sign", "hello", Sampling(max_tokens=400, ignore_eos=True)), on_chunk)
    assert watch.wait().finish_reason == "cancelled"
    engine.close()
    assert len(watch.tokens) < 5
    with deltas.batch([Row(None)]):
        pass


def test_what_cannot_be_is_refused_before_it_is_queued(engine: EmbeddedEngine) -> None:
    for prompt, sampling, code in (
        ("hello", Sampling(echo=True, logprobs=1), "bad-argument"),
        ([{"role": "user", "content": [{"type": "image"}]}], Sampling(), "bad-argument"),
        ({"words": "hello"}, Sampling(), "bad-argument"),
        ({"input_ids": torch.tensor([1, 2])}, Sampling(), "bad-argument"),
        ({"input_ids": torch.tensor([[pico.VOCABULARY]])}, Sampling(), "bad-argument"),
        ("hello", Sampling(max_tokens=10**6), "context-length"),
    ):
        with pytest.raises(DeltafoldError) as caught:
            engine.submit(Request("base", prompt, sampling), lambda _: None)  # type: ignore[arg-type]
        assert caught.value.code == code, prompt


def test_a_broken_input_fails_its_own_batch_alone(engine: EmbeddedEngine) -> None:
    watch = pico.Watch()
    odd = {"input_ids": torch.tensor([[5, 6]]), "no_such_input": torch.ones(1, 2)}
    engine.submit(Request("base", odd, LONG), watch)
    last = watch.wait()
    assert last.finish_reason == "error"
    assert "no_such_input" in str(last.error)
    (fine,) = engine.generate([Request("base", "hello", LONG)])
    assert len(fine.token_ids) == 12


def test_a_rebuilt_encoder_and_decoder(tmp_path: Path) -> None:
    """A bias on the scores that the model adds by itself cannot be applied to some rows."""
    bart = next(f for f in arch_sequences.SEQUENCES if f.name == "Bart")
    bart.build().save_pretrained(tmp_path / "base")
    tune = plain(tmp_path / "base", bart.kind)
    tune.final_logits_bias += torch.randn(1, arch_sequences.VOCABULARY)
    pack(tmp_path, "biased", tune, "lossless")
    pack(tmp_path, "plain", plain(tmp_path / "base", bart.kind), "lossless")
    prompts = {"biased": [5, 6, 7], "plain": [8, 9], "base": [4, 5]}
    with EmbeddedEngine.open(tmp_path / "base", zoo=tmp_path / "zoo", device="cpu") as engine:
        infos = {i.name: i.applied for i in engine.variants()}
        assert (infos["biased"], infos["plain"]) == ("rebuilt", "delta")
        outputs = list(engine.generate([Request(n, p, LONG) for n, p in prompts.items()]))
        with pytest.raises(DeltafoldError, match="encoder"):
            engine.submit(Request("base", [5] * 65), lambda _: None)
    for (name, prompt), output in zip(prompts.items(), outputs, strict=True):
        ids = {"input_ids": torch.tensor([prompt])}
        assert list(output.token_ids) == greedy(plain(tmp_path / name, bart.kind), ids, 12), name


def test_a_variants_own_generation_settings(made: Path, tmp_path: Path) -> None:
    """Tokens that a fine-tune suppresses are its own matter, and its end is, too."""
    (tmp_path / "zoo").mkdir()
    with EmbeddedEngine.open(made / "base", zoo=made / "zoo", device="cpu") as engine:
        (usual,) = engine.generate([Request("exact", "hello", LONG)])
    banned = usual.token_ids[0]
    tune = made / "exact-full"
    target = tmp_path / "tune"
    target.mkdir()
    for path in tune.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    settings = {"decoder_start_token_id": 0, "suppress_tokens": [banned], "eos_token_id": None}
    (target / "generation_config.json").write_text(json.dumps(settings))
    recipe = Recipe(default=parse_spec("lossless"))
    compress_checkpoint(made / "base", target, tmp_path / "zoo" / "tune", recipe=recipe)
    with EmbeddedEngine.open(made / "base", zoo=tmp_path / "zoo", device="cpu") as engine:
        requests = [Request(n, "hello", LONG) for n in ("tune", "base")]
        own, base = engine.generate(requests)
    assert banned not in own.token_ids
    ids = {"input_ids": torch.tensor([engine.encode("base", "hello")])}
    assert list(base.token_ids) == greedy(plain(made / "base"), ids, 12)


def test_images_go_through_the_variants_processor(tmp_path: Path) -> None:
    """And text alone joins the running batch token by token, in the same engine."""
    llava = next(f for f in arch_sequences.SEQUENCES if f.name == "Llava")
    config = llava.config()
    config.text_config.vocab_size, config.image_token_id = pico.VOCABULARY + 1, pico.VOCABULARY
    torch.manual_seed(0)
    llava.kind(config).save_pretrained(tmp_path / "base")
    words = pico.tokenizer(tmp_path / "base", vocabulary=pico.VOCABULARY)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert words.convert_tokens_to_ids("<image>") <= pico.VOCABULARY
    config.image_token_id = words.convert_tokens_to_ids("<image>")
    llava.kind(config).save_pretrained(tmp_path / "base")
    eyes = transformers.models.clip.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = transformers.LlavaProcessor(
        eyes, words, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    processor.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    processor.save_pretrained(tmp_path / "base")
    pack(tmp_path, "tune", plain(tmp_path / "base", llava.kind), "lossless")
    noise = np.random.default_rng(0)
    picture = Image.fromarray(noise.integers(0, 255, (20, 24, 3), dtype=np.uint8))
    given = {"text": "<image> hello", "images": picture}
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": " hello"}],
        }
    ]
    with EmbeddedEngine.open(tmp_path / "base", zoo=tmp_path / "zoo", device="cpu") as engine:
        prompts: list[Any] = [given, given, chat, "hello"]
        names = ["base", "tune", "tune", "tune"]
        requests = [Request(n, p, LONG) for n, p in zip(names, prompts, strict=True)]
        outputs = list(engine.generate(requests))
    inputs = dict(processor(text="<image> hello", images=picture, return_tensors="pt"))
    inputs.pop("attention_mask")
    for name, output in zip(names[:3], outputs[:3], strict=True):
        dense = plain(tmp_path / name, llava.kind)
        assert list(output.token_ids) == greedy(dense, inputs, 12), name
    text = {"input_ids": torch.tensor([words("hello").input_ids])}
    assert list(outputs[3].token_ids) == greedy(plain(tmp_path / "tune", llava.kind), text, 12)
    assert outputs[0].token_ids != outputs[1].token_ids


def test_sounds_go_through_the_variants_processor(tmp_path: Path) -> None:
    whisper = next(f for f in arch_sequences.SEQUENCES if f.name == "Whisper")
    config = whisper.config()
    config.max_source_positions = 50
    torch.manual_seed(0)
    whisper.kind(config).save_pretrained(tmp_path / "base")
    ears = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    ears.save_pretrained(tmp_path / "base")
    pack(tmp_path, "tune", plain(tmp_path / "base", whisper.kind), "lossless")
    sound = np.sin(np.arange(9000) / 7).astype(np.float32)
    with EmbeddedEngine.open(tmp_path / "base", zoo=tmp_path / "zoo", device="cpu") as engine:
        prompt = {"audio": sound, "sampling_rate": 16000}
        outputs = list(engine.generate([Request(n, prompt, LONG) for n in ("base", "tune")]))
    inputs = {
        "input_features": ears(sound, sampling_rate=16000, return_tensors="pt").input_features
    }
    for name, output in zip(("base", "tune"), outputs, strict=True):
        expected = greedy(plain(tmp_path / name, whisper.kind), inputs, 12)
        assert list(output.token_ids) == expected, name
        assert output.prompt_tokens == 0
