"""Labels and vectors: heads of many kinds, texts and pictures, in mixed batches."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pooling_zoo
import pytest
import torch
from PIL import Image

from deltafold.compress import DeltafoldError
from deltafold.runtime import EmbeddedEngine, PoolingEngine, PoolRequest
from deltafold.runtime.embedded.opening import generates

SENTENCES = ["the cat sat on a mat", "good film", "the film was not very good", "bad"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> pooling_zoo.Made:
    return pooling_zoo.texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def engine(texts: pooling_zoo.Made) -> Any:
    with PoolingEngine.open(texts.base, texts.zoo, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> pooling_zoo.Made:
    return pooling_zoo.pictures(tmp_path_factory.mktemp("pictures"))


def refused(code: str, work: Callable[[], object], match: str | None = None) -> None:
    with pytest.raises(DeltafoldError, match=match) as caught:
        work()
    assert caught.value.code == code


def logits(made: pooling_zoo.Made, name: str, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        out = made.dense(name)(**inputs).logits[0]
    assert isinstance(out, torch.Tensor)
    return out


def near(found: Any, expected: torch.Tensor) -> bool:
    return bool((torch.as_tensor(found) - expected).abs().max() < 1e-5)


def test_heads_of_other_sizes_share_a_batch(engine: Any, texts: pooling_zoo.Made) -> None:
    names = ["two", "five", "grade", "two"]
    before = engine.stats().steps
    asked = [PoolRequest(n, s) for n, s in zip(names, SENTENCES, strict=True)]
    found = engine.classify(asked)
    assert engine.stats().steps == before + 1, "one forward pass for all of them"
    for request, scores in zip(asked, found, strict=True):
        ids = engine.encode(request.variant, request.input)
        expected = logits(texts, request.variant, input_ids=torch.tensor([ids]))
        assert near(scores.logits, expected), request.variant
        assert scores.tokens == len(ids)
        assert scores.variant == request.variant
    two, five, grade, _ = found
    assert two.labels == ("bad", "good")
    assert two.label == two.labels[int(np.argmax(two.logits))]
    assert sum(two.probabilities) == pytest.approx(1)
    assert near(five.probabilities, torch.tensor(five.logits).sigmoid())
    assert len(five.labels) == 5
    assert grade.probabilities == grade.logits, "a regression is no probability"


def test_heads_of_two_layers_without_a_pooler(tmp_path: Path) -> None:
    """RoBERTa: texts of other lengths in one pass, each by its variant's own two-layer head."""
    made = pooling_zoo.roberta(tmp_path)
    noise = torch.Generator().manual_seed(0)
    names, lengths = ["two", "five", "two", "five"], [5, 9, 3, 38]
    asked = [
        PoolRequest(n, torch.randint(6, 96, (t,), generator=noise).tolist())
        for n, t in zip(names, lengths, strict=True)
    ]
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        assert {i.name: i.applied for i in engine.variants() if i.name != "base"} == {
            "two": "delta",
            "five": "delta",
        }
        engine.classify(asked)
        before = engine.stats().steps
        found = engine.classify(asked)
        assert engine.stats().steps == before + 1, "one forward pass for all of them"
    for request, scores in zip(asked, found, strict=True):
        ids = torch.tensor([request.input])
        assert near(scores.logits, logits(made, request.variant, input_ids=ids))


def test_pairs_of_texts_are_told_apart(engine: Any, texts: pooling_zoo.Made) -> None:
    first, second = "good film", "bad film"
    single, pair = engine.classify(
        [PoolRequest("five", "the cat"), PoolRequest("five", (first, second))]
    )
    ids = engine.encode("five", first) + engine.encode("five", second)[1:]
    types = [0] * (len(ids) - 3) + [1] * 3
    for scores, inputs in (
        (pair, {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}),
        (single, {"input_ids": torch.tensor([engine.encode("five", "the cat")])}),
    ):
        assert near(scores.logits, logits(texts, "five", **inputs))


def test_other_heads_give_all_that_they_return(engine: Any, texts: pooling_zoo.Made) -> None:
    ids = {"words": [4, 5, 6], "fill": [7, 8], "base": [7, 8, 9, 10]}
    found = engine.run([PoolRequest(name, tokens) for name, tokens in ids.items()])
    for (name, tokens), out in zip(ids.items(), found, strict=True):
        expected = logits(texts, name, input_ids=torch.tensor([tokens]))
        assert out.outputs["logits"].shape == expected.shape
        assert near(out.outputs["logits"], expected), name
    refused("bad-argument", lambda: engine.classify([PoolRequest("words", [1])]), "classify")
    refused("bad-argument", lambda: engine.classify([PoolRequest("bare", [1])]), "no head")


def test_vectors_are_those_of_the_dense_model(engine: Any, texts: pooling_zoo.Made) -> None:
    asked = [PoolRequest("bare", s) for s in SENTENCES]
    model = texts.dense("bare")
    for kind in ("mean", "cls", "last", "pooler"):
        found = engine.embed(asked, pooling=kind, normalize=False)
        for request, vector in zip(asked, found, strict=True):
            with torch.inference_mode():
                out = model(torch.tensor([engine.encode("bare", request.input)]))
            states = out.last_hidden_state[0]
            expected = {
                "mean": states.mean(0),
                "cls": states[0],
                "last": states[-1],
                "pooler": out.pooler_output[0],
            }[kind]
            assert near(vector.vector, expected), kind
    (unit,) = engine.embed(asked[:1])
    assert unit.vector.norm() == pytest.approx(1)


def test_a_pooler_that_nobody_brought_is_not_used(engine: Any) -> None:
    engine.embed([PoolRequest("two", [1])], pooling="pooler")
    for name in ("base", "words"):
        ask = lambda name=name: engine.embed([PoolRequest(name, [1])], pooling="pooler")  # noqa: E731
        refused("bad-argument", ask, "pooler")


def test_what_cannot_be_read_is_refused(engine: Any) -> None:
    def embed(variant: str, given: Any, **options: Any) -> Callable[[], object]:
        return lambda: engine.embed([PoolRequest(variant, given)], **options)

    refused("variant-not-found", embed("tow", [1]), "two")
    refused("context-length", embed("base", [5] * 65))
    refused("bad-argument", embed("base", [5, 96]), "token ids")
    refused("bad-argument", embed("base", []))
    refused("bad-argument", embed("base", np.zeros((4, 4, 3), np.uint8)), "pictures")
    refused("bad-argument", embed("base", [5], pooling="max"), "pooling")
    refused("bad-argument", embed("base", [5], dimensions=8), "cut")
    # One refusal takes nothing from what is asked later.
    assert len(engine.embed([PoolRequest("base", [5])])) == 1


def test_vectors_of_matryoshka_models_can_be_cut(engine: Any, texts: pooling_zoo.Made) -> None:
    path = texts.base / "config.json"
    config = path.read_text()
    path.write_text(json.dumps({**json.loads(config), "is_matryoshka": True}))
    try:
        (whole,) = engine.embed([PoolRequest("base", [5, 6])], normalize=False)
        (cut,) = engine.embed([PoolRequest("base", [5, 6])], dimensions=8)
    finally:
        path.write_text(config)
    assert near(cut.vector, torch.nn.functional.normalize(whole.vector[:8], dim=0))


def test_many_threads_get_their_own_answers(engine: Any) -> None:
    names = ["two", "five", "grade"]
    asked = [PoolRequest(names[i % 3], [4 + i % 9] * (1 + i % 7)) for i in range(48)]
    alone = [engine.classify([request])[0] for request in asked]
    start = threading.Barrier(12)

    def ask(requests: list[PoolRequest]) -> list[Any]:
        start.wait(30)
        return [engine.classify([request])[0] for request in requests]

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, [asked[i::12] for i in range(12)]))
    for i, scores in enumerate(found):
        for mine, expected in zip(scores, alone[i::12], strict=True):
            assert near(mine.logits, torch.tensor(expected.logits))


def test_a_closed_engine_takes_no_more(texts: pooling_zoo.Made) -> None:
    opened = PoolingEngine.open(texts.base, device="cpu", max_batch=2, max_batch_tokens=4)
    assert len(opened.embed([PoolRequest("base", [5] * 9)] * 5)) == 5
    opened.close()
    refused("busy", lambda: opened.embed([PoolRequest("base", [5])]))


def test_reward_models_on_a_decoder(tmp_path: Path) -> None:
    made = pooling_zoo.rewards(tmp_path)
    assert generates(made.base)
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as opened:
        asked = [PoolRequest(n, [9] * 3 + [i + 4]) for i, n in enumerate(["reward", "judge"] * 2)]
        asked.append(PoolRequest("reward", [7]))
        for request, scores in zip(asked, opened.classify(asked), strict=True):
            ids = torch.tensor([request.input])
            assert near(scores.logits, logits(made, request.variant, input_ids=ids))
            if request.variant == "reward":
                assert near(scores.probabilities, torch.tensor(scores.logits).sigmoid())


def test_pictures_by_each_variants_own_processor(
    pictures: pooling_zoo.Made, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with PoolingEngine.open(pictures.base, pictures.zoo, device="cpu") as opened:
        assert opened.pictures
        before = opened.stats().steps
        asked = [
            PoolRequest("two", noise),
            PoolRequest("five", tmp_path / "noise.png"),
            PoolRequest("five", Image.fromarray(noise)),
        ]
        found = opened.classify(asked)
        assert opened.stats().steps == before + 1
        (base,) = opened.embed([PoolRequest("base", noise)], normalize=False)
        refused("bad-argument", lambda: opened.embed([PoolRequest("base", "a cat")]), "texts")
        ask = lambda: opened.embed([PoolRequest("base", tmp_path / "no.png")])  # noqa: E731
        refused("bad-argument", ask, "no.png")
    small = Image.fromarray(noise).resize((32, 32), Image.Resampling.BILINEAR)
    plain = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    for request, scores in zip(asked, found, strict=True):
        pixels = (plain - {"two": 0.5, "five": 0.25}[request.variant]) / 0.5
        assert near(scores.logits, logits(pictures, request.variant, pixel_values=pixels))
        assert len(scores.labels) == {"two": 2, "five": 5}[request.variant]
    with torch.inference_mode():
        states = pictures.dense("base")(pixel_values=(plain - 0.5) / 0.5).last_hidden_state
    assert near(base.vector, states[0, 0])


def test_texts_and_pictures_in_one_space(tmp_path: Path) -> None:
    made = pooling_zoo.pairs(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(noise).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as opened:
        asked = [PoolRequest(n, x) for n in ("base", "art") for x in ("the cat", noise, [2, 9, 3])]
        found = opened.embed(asked, normalize=False)
        ids = opened.encode("base", "the cat")
    for request, vector in zip(asked, found, strict=True):
        model = made.dense(request.variant)
        with torch.inference_mode():
            if isinstance(request.input, np.ndarray):
                out = model.get_image_features(pixel_values=pixels)
            else:
                tokens = ids if isinstance(request.input, str) else request.input
                out = model.get_text_features(input_ids=torch.tensor([tokens]))
        assert near(vector.vector, out.pooler_output[0]), request


def test_an_engine_that_generates_is_another_one(texts: pooling_zoo.Made) -> None:
    assert not generates(texts.base)
    assert not hasattr(EmbeddedEngine, "embed")
    assert not hasattr(PoolingEngine, "submit")
