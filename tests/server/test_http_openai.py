"""The official client is the real specification: it must be able to read all we write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from deltafold.server.app import create_app
from deltafold.server.run import BackgroundServer

HELLO = [{"role": "user", "content": "hello"}]


def ask(client, model, **more):
    return client.chat.completions.create(model=model, messages=HELLO, **{"temperature": 0, **more})


@pytest.mark.parametrize(
    ("model", "text", "name", "fingerprint"),
    [
        ("sql", "HELLO", "sql", "df-b0b0cafe-3f2a9c11"),
        ("sql@3f2a", "HELLO", "sql", "df-b0b0cafe-3f2a9c11"),
        ("sql@sha256:3F2A9c", "HELLO", "sql", "df-b0b0cafe-3f2a9c11"),
        ("org/tiny:law", "olleh", "law", "df-b0b0cafe-77aa0001"),
        ("org/tiny:law@77aa", "olleh", "law", "df-b0b0cafe-77aa0001"),
        ("base:law", "olleh", "law", "df-b0b0cafe-77aa0001"),
        ("base", "hello", "base", "df-b0b0cafe-base"),
        ("org/tiny", "hello", "base", "df-b0b0cafe-base"),
        ("odd:name@beef", "hello", "odd:name@beef", "df-b0b0cafe-0dd00000"),
    ],
)
def test_model_selects_the_variant(client, model, text, name, fingerprint):
    reply = ask(client, model)
    assert reply.choices[0].message.content == text
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs is None
    assert (reply.model, reply.system_fingerprint) == (name, fingerprint)
    assert reply.object == "chat.completion"
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 5, 10)


def test_headers_say_who_answered(client):
    raw = client.chat.completions.with_raw_response.create(model="sql@3f2a", messages=HELLO)
    assert raw.headers["x-deltafold-variant"] == "sql"
    assert raw.headers["x-deltafold-digest"].startswith("sha256:3f2a9c11")
    assert raw.headers["x-request-id"].startswith("req-")


def test_chat_stream(client):
    with ask(client, "sql", stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].usage is None
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in pieces) == "HELLO"
    assert pieces[-1].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 10


def test_stream_without_usage_has_none(client):
    with ask(client, "sql", stream=True) as stream:
        assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_completions_of_every_prompt_form(client):
    for prompt, texts in [
        ("ab", ["AB"]),
        (["ab", "cd"], ["AB", "CD"]),
        ([97, 98], ["AB"]),
        ([[97], [98, 99]], ["A", "BC"]),
    ]:
        reply = client.completions.create(model="sql", prompt=prompt, temperature=0)
        assert [choice.text for choice in reply.choices] == texts
        assert [choice.index for choice in reply.choices] == list(range(len(texts)))
        assert reply.object == "text_completion"
        assert reply.usage.prompt_tokens == sum(map(len, texts))


def test_completion_stream_of_two_prompts(client):
    texts = ["", ""]
    ends = {}
    with client.completions.create(
        model="law", prompt=["abc", "wxyz"], temperature=0, stream=True, echo=True
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                ends[choice.index] = choice.finish_reason
    assert texts == ["abccba", "wxyzzyxw"]
    assert ends == {0: "stop", 1: "stop"}


def test_default_length_of_completions_is_16(client):
    reply = client.completions.create(model="base", prompt="x" * 40, temperature=0)
    assert len(reply.choices[0].text) == 16
    assert reply.choices[0].finish_reason == "length"


def test_n_and_seed(client, engine):
    first = ask(client, "sql", n=3, seed=7, temperature=1)
    again = ask(client, "sql", n=3, seed=7, temperature=1)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert [request.sampling.seed for request in engine.requests[:3]] == [7, 8, 9]
    assert first.usage.prompt_tokens == 5
    assert first.usage.completion_tokens == 24
    ask(client, "sql", n=2, seed=2**63 - 1)
    assert engine.requests[-1].sampling.seed == -(2**63)


def test_sampling_reaches_the_engine(client, engine):
    extra = {"top_k": 5, "ignore_eos": True, "stop_token_ids": [3], "delta_scale": 1.5}
    ask(client, "sql", temperature=0.5, top_p=0.9, max_tokens=4, stop=["x", "y"], extra_body=extra)
    sampling = engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 4)
    assert (sampling.stop, sampling.stop_token_ids) == (("x", "y"), (3,))
    assert (sampling.top_k, sampling.ignore_eos, sampling.scale) == (5, True, 1.5)
    client.chat.completions.create(model="sql", messages=HELLO, max_completion_tokens=3)
    sampling = engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1, 1, 3)
    assert (sampling.seed, sampling.logprobs, sampling.scale) == (None, None, 1)


def test_stop_and_length(client):
    assert ask(client, "base", stop="l").choices[0].message.content == "he"
    reply = ask(client, "base", max_tokens=2)
    assert reply.choices[0].message.content == "he"
    assert reply.choices[0].finish_reason == "length"


def test_chat_logprobs(client):
    content = ask(client, "sql", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [token.token for token in content] == list("HELLO")
    assert content[0].logprob == -0.5
    assert content[0].bytes == [72]
    top = content[0].top_logprobs
    assert [one.token for one in top] == ["H", "?", "\ufffd"]
    assert top[1].logprob == -9999.0  # the engine said minus infinity
    assert top[2].bytes is None
    assert ask(client, "sql", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_chat_logprobs_streamed(client):
    with ask(client, "sql", stream=True, logprobs=True) as stream:
        tokens = [
            token.token
            for chunk in stream
            for choice in chunk.choices
            if choice.logprobs
            for token in choice.logprobs.content
        ]
    assert tokens == list("HELLO")


def test_completion_logprobs_with_echo(client, engine):
    reply = client.completions.create(
        model="sql", prompt="ab", temperature=0, logprobs=1, echo=True
    )
    choice = reply.choices[0]
    assert choice.text == "abAB"
    assert choice.logprobs.tokens == ["a", "b", "A", "B"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs[:2] == [None, {"b": -0.5}]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert engine.requests[-1].sampling.echo


def test_completion_logprobs_streamed_with_echo(client):
    offsets, tokens = [], []
    with client.completions.create(
        model="sql", prompt=[97, 98], temperature=0, logprobs=0, echo=True, stream=True
    ) as stream:
        for chunk in stream:
            if chunk.choices[0].logprobs:
                offsets += chunk.choices[0].logprobs.text_offset
                tokens += chunk.choices[0].logprobs.tokens
    assert tokens == ["a", "b", "A", "B"]
    assert offsets == [0, 1, 2, 3]


def test_scoring_a_prompt(client):
    reply = client.completions.create(
        model="sql", prompt="abc", temperature=0, logprobs=1, echo=True, max_tokens=0
    )
    assert reply.choices[0].text == "abc"
    assert len(reply.choices[0].logprobs.tokens) == 3
    assert reply.usage.completion_tokens == 0


def test_messages_that_clients_send(client):
    first = ask(client, "sql").choices[0].message
    reply = client.chat.completions.create(
        model="sql",
        temperature=0,
        messages=[
            {"role": "developer", "content": "be"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            first.model_dump(),
            {"role": "user", "content": "c", "name": "ann"},
        ],
    )
    assert reply.choices[0].message.content == "BE A\nB HELLO C"


def test_models(client):
    cards = client.models.list().data
    assert cards[0].id == "base"
    assert cards[0].parent is None
    assert cards[0].root == "org/tiny"
    sql = client.models.retrieve("sql")
    assert (sql.id, sql.root, sql.parent, sql.owned_by) == ("sql", "sql", "org/tiny", "deltafold")
    assert sql.created == 1700000000
    assert sql.deltafold["digest"].startswith("sha256:3f2a")
    assert sql.deltafold["ratio"] == 0.25
    assert sql.deltafold["quality"] == {"top1": 0.99}
    assert (sql.deltafold["applied"], sql.deltafold["obstacle"]) == ("rebuilt", "mixer.A_log")
    assert cards[0].deltafold["applied"] is None
    assert set(sql.deltafold) == {
        "digest", "codec", "delta_bytes", "ratio", "tier", "coverage", "quality",
        "applied", "obstacle",
    }  # fmt: skip
    assert client.models.retrieve("org/tiny").id == "base"
    assert client.models.retrieve("sql@3f2a").id == "sql"


def test_served_model_name(engine):
    app = create_app(engine, served_model_name="house")
    with (
        BackgroundServer(app) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        for name in ("house", "base", "org/tiny"):
            assert ask(client, name).model == "house"
        assert ask(client, "house:sql").model == "sql"
        assert client.models.list().data[0].id == "house"
        assert client.models.retrieve("sql").parent == "house"


@pytest.mark.parametrize("model", ["sqk", "sql@dead", "other/base:sql", "sql@", "base@3f2a"])
def test_unknown_models(client, model):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert caught.value.type == "invalid_request_error"
    if model == "sqk":
        assert "near: sql, law" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(model)


def test_context_length(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "sql", max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"


def test_error_in_mid_stream_reaches_the_client(client):
    with ask(client, "dies-later", stream=True) as stream, pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "internal_error"
    assert "secret" not in str(caught.value)


def test_keys(engine):
    with BackgroundServer(create_app(engine, api_keys=["one", "zwö"])) as server:
        for key in ("one",):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
                assert ask(client, "sql").model == "sql"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="on") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                ask(client, "sql")
            assert caught.value.code == "invalid_api_key"


def test_many_at_once(client):
    models = ["sql", "law", "base", "org/tiny:sql"] * 8
    expected = {"sql": "HELLO", "law": "olleh", "base": "hello", "org/tiny:sql": "HELLO"}

    def one(number):
        model = models[number]
        if number % 3:
            return ask(client, model).choices[0].message.content
        with ask(client, model, stream=True) as stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(32)))
    assert answers == [expected[model] for model in models]
