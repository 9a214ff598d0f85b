"""Labels and vectors over HTTP: the real engine, the official client."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pooling_zoo
import pytest
import torch
import transformers
from PIL import Image

from deltafold.runtime import PoolingEngine, PoolRequest
from deltafold.server.app import create_app
from deltafold.server.run import BackgroundServer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pooling_zoo.Made:
    """Heads of many kinds, and a variant with fewer layers than the base."""
    made = pooling_zoo.texts(tmp_path_factory.mktemp("texts"))
    cls, sizes = transformers.BertForSequenceClassification, {"num_hidden_layers": 1}
    made.tune(cls, "short", "lossless", pooling_zoo.tokenizer, num_labels=3, **sizes)
    return made


@pytest.fixture(scope="module")
def engine(made: pooling_zoo.Made) -> Iterator[PoolingEngine]:
    with PoolingEngine.open(
        made.base, made.zoo, device="cpu", served_model_name="org/bert"
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def pooling_url(engine: PoolingEngine) -> Iterator[str]:
    with BackgroundServer(create_app(engine)) as server:
        yield server.url


@pytest.fixture(scope="module")
def pooling_client(pooling_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pooling_url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.loads(reply.read()), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def test_vectors_by_the_official_client(
    pooling_client: openai.OpenAI, engine: PoolingEngine
) -> None:
    texts = ["the cat sat", "good film"]
    expected = engine.embed([PoolRequest("two", text) for text in texts])
    # The client asks for base64 by itself, and for numbers when told to.
    for options in ({}, {"encoding_format": "float"}):
        reply = pooling_client.embeddings.create(model="two", input=texts, **options)  # type: ignore[call-overload]
        assert reply.model == "two"
        assert [item.index for item in reply.data] == [0, 1]
        for item, vector in zip(reply.data, expected, strict=True):
            assert np.allclose(item.embedding, vector.vector.numpy(), atol=1e-6)
        assert reply.usage.prompt_tokens == sum(v.tokens for v in expected)
    ids = engine.encode("two", texts[0])
    for given in (ids, [ids, ids]):
        reply = pooling_client.embeddings.create(model="two", input=given)
        assert np.allclose(reply.data[-1].embedding, expected[0].vector.numpy(), atol=1e-6)


def test_labels_in_vllms_shape(pooling_url: str, engine: PoolingEngine) -> None:
    texts = ["the cat sat", "good film"]
    expected = engine.classify([PoolRequest("two", text) for text in texts])
    body = {"model": "two", "input": texts}
    status, reply, headers = post(f"{pooling_url}/classify", body)
    assert status == 200
    assert reply.keys() == {"id", "object", "created", "model", "data", "usage"}
    assert headers["x-deltafold-variant"] == "two"
    assert headers["x-deltafold-digest"] == expected[0].digest
    for i, (item, scores) in enumerate(zip(reply["data"], expected, strict=True)):
        assert item["index"] == i
        assert item["label"] == scores.label
        assert item["probs"] == pytest.approx(scores.probabilities)
        assert item["num_classes"] == 2
    _, raw, _ = post(f"{pooling_url}/classify", {**body, "use_activation": False})
    assert raw["data"][0]["probs"] == pytest.approx(expected[0].logits)


def test_many_clients_and_models_at_once(
    pooling_url: str, made: pooling_zoo.Made, engine: PoolingEngine
) -> None:
    """Applied and rebuilt variants, labels and vectors: each the restored dense model's."""
    names = ["two", "five", "short"] * 8
    texts = [" ".join(pooling_zoo.WORDS[i % 5 : i % 5 + 1 + i % 7]) for i in range(len(names))]
    with ThreadPoolExecutor(12) as pool:
        labels, vectors = (
            pool.map(
                lambda n, t, r=route: post(pooling_url + r, {"model": n, "input": t}), names, texts
            )
            for route in ("/classify", "/v1/embeddings")
        )
    dense = {name: made.dense(name) for name in set(names)}
    for name, text, (a, scores, _), (b, vector, _) in zip(
        names, texts, labels, vectors, strict=True
    ):
        assert (a, b) == (200, 200)
        ids = torch.tensor([engine.encode(name, text)])
        with torch.inference_mode():
            logits = dense[name](ids).logits[0]
            states = dense[name].bert(ids).last_hidden_state[0].mean(0)
        probabilities = logits.sigmoid() if name == "five" else logits.softmax(0)
        assert scores["data"][0]["probs"] == pytest.approx(probabilities.tolist(), abs=1e-5)
        unit = torch.nn.functional.normalize(states, dim=0)
        assert vector["data"][0]["embedding"] == pytest.approx(unit.tolist(), abs=1e-5)


def test_a_rebuilt_variant_is_told_of(pooling_url: str, pooling_client: openai.OpenAI) -> None:
    cards = {m.id: (m.model_extra or {})["deltafold"] for m in pooling_client.models.list()}
    assert cards["two"]["applied"] == "delta"
    assert cards["short"]["applied"] == "rebuilt"
    assert cards["short"]["obstacle"] == "config.json: num_hidden_layers"
    pooling_client.embeddings.create(model="short", input="a cat")
    with urllib.request.urlopen(f"{pooling_url}/metrics") as reply:
        text = reply.read().decode()
    assert 'deltafold_delta_resident_bytes{variant="short"}' in text


def test_errors_say_what_to_mend(pooling_url: str, pooling_client: openai.OpenAI) -> None:
    for route, body, status, code in (
        ("/classify", {"model": "words", "input": "a"}, 400, "bad_argument"),
        ("/classify", {"model": "tow", "input": "a"}, 404, "model_not_found"),
        ("/classify", {"model": "two", "input": []}, 400, "invalid_value"),
        ("/classify", {"model": "two", "input": "a", "top_k": 1}, 400, None),
        ("/v1/embeddings", {"model": "two", "input": [5] * 65}, 400, "context_length_exceeded"),
        ("/v1/embeddings", {"model": "two", "input": "a", "dimensions": 4}, 400, "bad_argument"),
        ("/v1/completions", {"model": "two", "prompt": "a"}, 400, "not_a_generating_model"),
    ):
        found, reply, _ = post(pooling_url + route, body)
        assert found == status, (route, body, reply)
        assert code is None or reply["error"]["code"] == code, reply
    with pytest.raises(openai.BadRequestError, match="does not generate"):
        pooling_client.chat.completions.create(
            model="two", messages=[{"role": "user", "content": "hi"}]
        )


def test_a_generating_server_does_not_embed(url: str) -> None:
    for route in ("/classify", "/v1/embeddings"):
        status, reply, _ = post(url + route, {"model": "sql", "input": "a"})
        assert (status, reply["error"]["code"]) == (400, "not_a_pooling_model")


def test_the_other_routes_work(pooling_url: str, pooling_client: openai.OpenAI) -> None:
    listed = {m.id for m in pooling_client.models.list()}
    assert {"org/bert", "two", "five"} <= listed
    assert pooling_client.models.retrieve("base").id == "org/bert"
    _, tokens, _ = post(f"{pooling_url}/tokenize", {"model": "two", "prompt": "the cat"})
    assert (tokens["count"], tokens["max_model_len"]) == (4, 64)
    pooling_client.embeddings.create(model="five", input="a cat")
    with urllib.request.urlopen(f"{pooling_url}/metrics") as reply:
        text = reply.read().decode()
    assert 'deltafold_prompt_tokens_total{variant="five"}' in text
    assert 'deltafold_requests_total{finish_reason="stop",variant="five"}' in text
    with urllib.request.urlopen(f"{pooling_url}/ready") as reply:
        assert reply.status == 200


def test_texts_and_pictures_in_one_space(tmp_path: Path) -> None:
    """CLIP: vectors of texts and of pictures, at once, of base and variant, as dense models give."""
    made = pooling_zoo.pairs(tmp_path)
    raw = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(raw, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(raw.getvalue()).decode()}"
    with (
        PoolingEngine.open(made.base, made.zoo, device="cpu") as engine,
        BackgroundServer(create_app(engine)) as server,
    ):
        asked = [(n, x) for n in ("art", "base") for x in ("the cat sat", picture)]
        with ThreadPoolExecutor(4) as pool:
            replies = list(
                pool.map(
                    lambda a: post(f"{server.url}/v1/embeddings", {"model": a[0], "input": a[1]}),
                    asked,
                )
            )
        ids = torch.tensor([engine.encode("art", "the cat sat")])
    seen = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    vectors = []
    for (name, given), (status, reply, _) in zip(asked, replies, strict=True):
        assert status == 200, reply
        vectors.append(torch.tensor(reply["data"][0]["embedding"]))
        with torch.inference_mode():
            both = made.dense(name)(input_ids=ids, pixel_values=seen)
        expected = both.image_embeds if given == picture else both.text_embeds
        assert (vectors[-1] - expected[0]).abs().max() < 1e-5, name
    assert all((vectors[i] - vectors[i + 2]).abs().max() > 1e-2 for i in (0, 1)), "each its own"


def test_pictures_as_data_urls(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = pooling_zoo.pictures(tmp_path_factory.mktemp("pictures"))
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)
    )
    raw = io.BytesIO()
    picture.save(raw, "PNG")
    plain = base64.b64encode(raw.getvalue()).decode()
    with (
        PoolingEngine.open(made.base, made.zoo, device="cpu") as engine,
        BackgroundServer(create_app(engine)) as server,
    ):
        (expected,) = engine.classify([PoolRequest("five", picture)])
        for text in (f"data:image/png;base64,{plain}", plain):
            status, reply, _ = post(f"{server.url}/classify", {"model": "five", "input": text})
            assert status == 200, reply
            assert reply["data"][0]["probs"] == pytest.approx(expected.probabilities)
        for text in ("data:image/png;base64,AAAA", "a cat"):
            status, reply, _ = post(f"{server.url}/classify", {"model": "five", "input": [text]})
            assert (status, reply["error"]["code"]) == (400, "invalid_image")
