"""The server on the real engine: real deltas, real HTTP, the official client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import urllib.request
from collections.abc import Iterator

import numpy as np
import openai
import pytest
import torch
import zoo_models
from safetensors.torch import save

from deltafold.compress.zoo_aliases import remove_alias, set_alias
from deltafold.runtime import EmbeddedEngine, Embeddings, Request, Sampling
from deltafold.server.app import create_app
from deltafold.server.run import BackgroundServer

CODECS = {"sign1": "bitdelta", "int4": "int:bits=4,group=32", "exact": "lossless"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    return zoo_models.make(tmp_path_factory.mktemp("real"), "Qwen2", codecs=CODECS)


@pytest.fixture(scope="module")
def engine(made: zoo_models.Models) -> Iterator[EmbeddedEngine]:
    options = {"device": "cpu", "strict": False, "served_model_name": "org/tiny"}
    with EmbeddedEngine.open(made.base, zoo=made.zoo, **options) as opened:  # type: ignore[arg-type]
        yield opened


@pytest.fixture(scope="module")
def url(engine: EmbeddedEngine) -> Iterator[str]:
    with BackgroundServer(create_app(engine)) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_models_say_what_they_are(client: openai.OpenAI) -> None:
    listed = {m.id: m for m in client.models.list()}
    assert list(listed) == ["org/tiny", "exact", "int4", "sign1"]
    extra = listed["sign1"].model_extra
    assert extra is not None
    assert extra["parent"] == "org/tiny"
    assert extra["deltafold"]["coverage"] == 1.0
    assert extra["deltafold"]["digest"].startswith("sha256:")


def test_an_alias_is_a_name_of_its_own(
    client: openai.OpenAI, made: zoo_models.Models, engine: EmbeddedEngine
) -> None:
    def ask(model: str) -> tuple[str, str]:
        done = client.completions.create(model=model, prompt="list", max_tokens=8, temperature=0)
        return done.choices[0].text, str(done.system_fingerprint)

    try:
        for name in ("sign1", "exact"):
            set_alias(made.zoo, "prod", name)
            listed = {m.id: m.model_extra or {} for m in client.models.list()}
            assert (listed["prod"]["root"], listed["prod"]["parent"]) == (name, "org/tiny")
            digest = listed["prod"]["deltafold"]["digest"]
            assert digest == listed[name]["deltafold"]["digest"]
            assert ask("prod") == ask(name) == ask(f"org/tiny:prod@{digest[7:15]}")
        assert set(engine.stats().resident) <= set(CODECS)
    finally:
        remove_alias(made.zoo, "prod")
    with pytest.raises(openai.NotFoundError):
        ask("prod")


def test_a_concurrent_mix_over_http_equals_the_engine(url: str, engine: EmbeddedEngine) -> None:
    names = ["base", *CODECS] * 6

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            replies = await asyncio.gather(
                *(
                    client.completions.create(
                        model=name, prompt=f"{i}: the fox", max_tokens=12, temperature=0
                    )
                    for i, name in enumerate(names)
                )
            )
        return [reply.choices[0].text for reply in replies]

    expected = engine.generate(
        [Request(n, f"{i}: the fox", Sampling(max_tokens=12)) for i, n in enumerate(names)]
    )
    assert asyncio.run(ask_all()) == [out.text for out in expected]


def test_a_mixture_is_a_model(client: openai.OpenAI, engine: EmbeddedEngine, url: str) -> None:
    name = "sign1*0.7+exact*0.3"
    digest = engine.resolve(name).digest.removeprefix("sha256:")
    asked = {"prompt": "the fox", "max_tokens": 8, "temperature": 0}
    replies = [
        client.completions.create(model=m, **asked)  # type: ignore[call-overload]
        for m in (name, f"org/tiny:{name}", f"{name}@{digest[:8]}")
    ]
    (expected,) = engine.generate([Request(name, "the fox", Sampling(max_tokens=8))])
    assert {r.choices[0].text for r in replies} == {expected.text}
    assert replies[0].system_fingerprint.endswith(f"-{digest[:8]}")
    with pytest.raises(openai.NotFoundError, match="sing1"):
        client.completions.create(model="sing1*0.5+exact*0.5", prompt="x")
    with urllib.request.urlopen(f"{url}/metrics") as page:
        text = page.read().decode()
    assert 'variant="_mixture"' in text
    assert "sign1*" not in text


def test_streamed_chat_equals_whole_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hello"}]
    for model in ("base", "exact"):
        whole = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=10,
            temperature=0,  # type: ignore[arg-type]
        )
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=10,
            temperature=0,
            stream=True,  # type: ignore[arg-type]
        )
        text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
        assert text == whole.choices[0].message.content


def test_delta_scale_zero_is_the_base(client: openai.OpenAI) -> None:
    def ask(model: str, **extra: object) -> str:
        reply = client.completions.create(
            model=model, prompt="abc", max_tokens=12, temperature=0, extra_body=extra or None
        )
        return reply.choices[0].text

    assert ask("sign1", delta_scale=0.0) == ask("base")
    assert ask("sign1") != ask("base")


def test_unknown_model_is_404_with_near_names(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="sign1"):
        client.completions.create(model="sign", prompt="x")


def test_a_broken_delta_answers_with_its_error_and_harms_nobody(
    client: openai.OpenAI, made: zoo_models.Models
) -> None:
    folder = made.base.parent
    zoo_models.fine_tune(folder, "broken")
    payload = zoo_models.pack(folder, "broken", "bitdelta") / "delta.safetensors"
    raw = bytearray(payload.read_bytes())
    raw[-3] ^= 4
    payload.write_bytes(raw)
    try:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="broken", prompt="x", max_tokens=2)
        assert caught.value.status_code == 503
        whole = {"ignore_eos": True}
        fine = client.completions.create(model="sign1", prompt="x", max_tokens=2, extra_body=whole)
        assert fine.choices[0].finish_reason == "length"
    finally:
        shutil.rmtree(made.zoo / "broken")


def test_metrics_count(client: openai.OpenAI, url: str) -> None:
    client.completions.create(model="int4", prompt="abc", max_tokens=3)
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        text = reply.read().decode()
    assert 'deltafold_delta_resident_bytes{variant="int4"}' in text
    with urllib.request.urlopen(f"{url}/ready") as reply:
        assert reply.status == 200
        json.loads(reply.read())


def encoded(values: torch.Tensor, kind: str) -> str:
    """As a request body holds it."""
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, values.numpy())
        data = file.getvalue()
    else:
        data = save({"embeds": values.to(torch.bfloat16)})
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_input_embeddings_over_http(url: str, engine: EmbeddedEngine, kind: str) -> None:
    noise = torch.Generator().manual_seed(0)
    values = (torch.randn(5, 64, generator=noise) * 0.2).to(torch.bfloat16).float()
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    expected = next(iter(engine.generate([Request("int4", Embeddings(values), sampling)])))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        extra = {"prompt_embeds": encoded(values, kind), "ignore_eos": True}
        reply = client.completions.create(
            model="int4",
            prompt=None,  # type: ignore[arg-type]
            max_tokens=4,
            temperature=0,
            extra_body=extra,
        )
    assert reply.choices[0].text == expected.text
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 5
