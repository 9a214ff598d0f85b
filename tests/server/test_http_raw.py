"""What the official client hides: raw bodies, headers, refusals, disconnects, probes, metrics."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from fastapi.openapi.models import OpenAPI

from deltafold.compress.errors import CODES, DeltafoldError
from deltafold.server.app import create_app
from deltafold.server.errors import STATUSES
from deltafold.server.openai.schemas import ChatRequest, CompletionRequest, TokenizeRequest
from deltafold.server.run import BackgroundServer, bind

CHAT = {"model": "sql", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "sql", "prompt": "hello"}


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        yield client


def error_of(reply, status):
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("delta_scales", 1, "delta_scales"),
        ("frequency_penalty", 0.5, "frequency_penalty"),
        ("tools", [{"type": "function"}], "tools"),
        ("response_format", {"type": "json_object"}, "response_format"),
        ("store", True, "store"),
        ("temperature", -1, "temperature"),
        ("top_p", 0, "top_p"),
        ("n", 0, "n"),
        ("n", 1000, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 1.5, "max_tokens"),
        ("seed", 2**64, "seed"),
        ("stop", "", "stop"),
        ("stop", ["a"] * 17, "stop"),
        ("stop", 3, "stop"),
        ("stop_token_ids", [-1], "stop_token_ids[0]"),
        ("top_logprobs", 21, "top_logprobs"),
        ("delta_scale", "much", "delta_scale"),
        ("messages", [], "messages"),
        ("messages", "hi", "messages"),
        ("messages", [{"role": "tool", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": 3}], "messages[0].content"),
        ("messages", [{"role": "user", "content": "x", "feeling": 1}], "messages[0].feeling"),
        ("messages", [{"role": "user", "tool_calls": [{}]}], "messages[0].tool_calls"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content",
        ),
        ("stream_options", {"shape": 1}, "stream_options.shape"),
        ("model", "", "model"),
        ("model", None, "model"),
    ],
)
def test_refused_fields_are_named(http, engine, field, value, param):
    error = error_of(http.post("/v1/chat/completions", json={**CHAT, field: value}), 400)
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine.requests == []


@pytest.mark.parametrize(
    "more",
    [
        {"top_logprobs": 2},
        {"stream_options": {"include_usage": True}},
        {"max_tokens": 3, "max_completion_tokens": 4},
    ],
)
def test_fields_that_contradict_each_other(http, more):
    error = error_of(http.post("/v1/chat/completions", json={**CHAT, **more}), 400)
    assert next(iter(more)) in error["message"]


def test_fields_at_their_defaults_are_accepted(http):
    idle = {
        "user": "ann",
        "metadata": {"a": "b"},
        "store": False,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "n": 1,
        "tools": None,
        "tool_choice": "none",
        "functions": [],
        "logit_bias": {},
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "temperature": None,
        "stop": None,
        "max_tokens": None,
        "seed": None,
        "stream": False,
        "stream_options": None,
    }
    assert http.post("/v1/chat/completions", json={**CHAT, **idle}).status_code == 200
    idle_text = {"suffix": None, "best_of": 1, "echo": False, "logprobs": None, "logit_bias": None}
    assert http.post("/v1/completions", json={**TEXT, **idle_text}).status_code == 200


@pytest.mark.parametrize(
    "prompt", [[], "missing", None, 3, {}, [[]], ["a", [1]], [1, "a"], [True], [-1], [["a"]], [1.5]]
)
def test_bad_prompts(http, prompt):
    body = {"model": "sql"} if prompt == "missing" else {"model": "sql", "prompt": prompt}
    error = error_of(http.post("/v1/completions", json=body), 400)
    assert error["param"] == "prompt"


def test_completion_limits(http):
    post = http.post
    assert (
        "echo" in error_of(post("/v1/completions", json={**TEXT, "max_tokens": 0}), 400)["message"]
    )
    many = {**TEXT, "prompt": ["a"] * 600, "n": 2}
    assert "1024" in error_of(post("/v1/completions", json=many), 400)["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": 1' + b"0" * 9999],
)
def test_bodies_that_are_no_objects(http, content):
    reply = http.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    error_of(reply, 400)


def test_body_without_its_content_type(http):
    reply = http.post("/v1/completions", content=json.dumps(TEXT))
    assert "content-type" in error_of(reply, 400)["message"]


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        ("/v1/completions", r'{"model": "\ud800", "prompt": "x"}', 400),
        ("/v1/completions", r'{"model": "sql", "prompt": "\ud800"}', 400),
        ("/v1/completions", r'{"model": "sql", "prompt": "x", "stop": ["\ud800"]}', 400),
        ("/v1/completions", r'{"model": "sql", "prompt": "x", "\ud800": 1}', 400),
        ("/v1/chat/completions", r'{"model": "sql", "messages": [{"role": "\ud800"}]}', 400),
        (
            "/v1/chat/completions",
            r'{"model": "sql", "messages": [{"role": "user", "content": "\udfff"}]}',
            400,
        ),
        ("/tokenize", r'{"model": "sql", "prompt": "\ud800"}', 400),
    ],
)
def test_half_a_surrogate_pair_is_refused(http, route, body, status):
    headers = {"content-type": "application/json"}
    error_of(http.post(route, content=body.encode(), headers=headers), status)


def test_routes_that_do_not_exist(http):
    assert error_of(http.get("/v1/nothing"), 404)["message"] == "Not Found"
    error_of(http.get("/v1/chat/completions"), 405)


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("checksum", 503, "variant_unavailable"),
        ("base-mismatch", 409, "base_mismatch"),
        ("not-enough-memory", 503, "not_enough_memory"),
        ("dies-at-once", 503, "not_enough_memory"),
        ("crash", 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token_are_statuses(
    http, engine, eventually, model, status, code, stream
):
    body = {**TEXT, "model": model, "stream": stream, "n": 2}
    reply = http.post("/v1/completions", json=body)
    error = error_of(reply, status)
    assert error["code"] == code
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text
    retriable = code in ("not_enough_memory", "internal_error")
    assert (reply.headers.get("x-should-retry") == "false") == (not retriable)
    assert ("retry-after" in reply.headers) == (code == "not_enough_memory")
    if status >= 500:
        assert "mend it" not in error["message"]  # the operator's business, in the log
    eventually(lambda: engine.running == 0)


def test_failure_of_a_later_token_without_a_stream(http, caplog):
    with caplog.at_level(logging.ERROR):
        reply = http.post(
            "/v1/completions",
            json={**TEXT, "model": "dies-later", "temperature": 0},
            headers={"x-request-id": "mine-1"},
        )
    error = error_of(reply, 500)
    assert "mine-1" in error["message"]
    assert reply.headers["x-request-id"] == "mine-1"
    assert "ZeroDivisionError" in caplog.text


def test_crash_is_logged_with_its_request_id(http, caplog):
    reply = http.post("/v1/completions", json={**TEXT, "model": "crash"})
    assert reply.headers["x-request-id"] in reply.json()["error"]["message"]
    assert reply.headers["x-request-id"] in caplog.text
    assert "secret detail" in caplog.text


def test_request_ids_that_could_forge_log_lines_are_replaced(http):
    given = http.get("/health", headers={"x-request-id": "a b{}"}).headers["x-request-id"]
    assert given.startswith("req-")


def test_one_refused_prompt_stops_the_others(http, engine, eventually):
    body = {"model": "slow", "prompt": ["a", "b" * 600], "max_tokens": None}
    assert error_of(http.post("/v1/completions", json=body), 400)["code"] == (
        "context_length_exceeded"
    )
    eventually(lambda: engine.running == 0)
    assert engine.cancels == ["t1"]


def test_every_error_code_has_a_status():
    assert set(STATUSES) == set(CODES)


def test_events_on_the_wire(http):
    with http.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.headers["x-deltafold-variant"] == "sql"
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(url, engine, eventually, stream):
    body = json.dumps({"model": "slow", "prompt": "x", "max_tokens": 400, "stream": stream, "n": 2})
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall((head + body).encode())
        eventually(lambda: engine.running == 2)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    eventually(lambda: engine.running == 0)
    assert sorted(engine.cancels) == ["t1", "t2"]


def test_a_client_that_leaves_while_its_variant_loads(url, engine, eventually):
    engine.disk.clear()
    body = {"model": "loads-slowly", "prompt": "x" * 400, "max_tokens": 100}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(20, read=0.3))
    engine.disk.set()
    eventually(lambda: engine.cancels == ["t1"])


def test_slow_loads_do_not_hold_up_others(http, engine):
    engine.disk.clear()
    body = {**TEXT, "model": "loads-slowly"}
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(8)]
        assert http.post("/v1/completions", json=TEXT).status_code == 200
        engine.disk.set()
        assert all(reply.result().status_code == 200 for reply in slow)


def test_tokenize_and_back(http):
    reply = http.post("/tokenize", json={"model": "sql", "prompt": "ab"}).json()
    assert reply == {"tokens": [97, 98], "count": 2, "max_model_len": 512}
    chat = {"model": "sql", "messages": CHAT["messages"], "add_special_tokens": True}
    assert http.post("/tokenize", json=chat).json()["count"] == 5
    assert http.post("/detokenize", json={"model": "sql", "tokens": [97]}).json() == {"prompt": "a"}
    error_of(http.post("/tokenize", json={"model": "sql"}), 400)
    error_of(http.post("/tokenize", json={"model": "nope", "prompt": "a"}), 404)
    assert error_of(http.post("/tokenize", json={"prompt": "a"}), 400)["param"] == "model"


def test_while_the_base_loads(engine):
    promise: Future = Future()
    with (
        BackgroundServer(create_app(promise)) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503
        assert http.get("/metrics").status_code == 200
        reply = http.post("/v1/completions", json=TEXT)
        assert error_of(reply, 503)["code"] == "engine_loading"
        assert reply.headers["retry-after"] == "1"
        promise.set_result(engine)
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_when_the_base_cannot_be_loaded():
    promise: Future = Future()
    promise.set_exception(DeltafoldError("not-found", "no such folder"))
    with (
        BackgroundServer(create_app(promise)) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        assert http.get("/ready").json() == {"status": "failed"}
        assert error_of(http.get("/v1/models"), 503)["code"] == "engine_failed"


def test_open_and_guarded_routes(engine):
    with (
        BackgroundServer(create_app(engine, api_keys=["k1", "k2"])) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        for path in ("/health", "/ready", "/metrics"):
            assert http.get(path).status_code == 200
        for path in ("/v1/models", "/version", "/docs", "/openapi.json", "/nothing"):
            reply = http.get(path)
            assert error_of(reply, 401)["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        for header in ("Bearer k2", "bearer k1"):
            assert http.get("/v1/models", headers={"authorization": header}).status_code == 200
        for header in ("Bearer k", "Bearer", "Basic k1", "k1", "Bearer \xff"):
            reply = http.get("/v1/models", headers={"authorization": header.encode("latin-1")})
            assert reply.status_code == 401


def test_an_empty_key_is_refused(engine):
    with pytest.raises(ValueError, match="empty API key"):
        create_app(engine, api_keys=[""]).build_middleware_stack()


def test_metrics(make_engine):
    with (
        BackgroundServer(create_app(make_engine())) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        http.post("/v1/completions", json={**TEXT, "n": 2})
        http.post("/v1/completions", json={**TEXT, "model": "nope"})
        reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    lines = reply.text.splitlines()
    for expected in (
        'deltafold_requests_total{finish_reason="stop",variant="sql"} 2.0',
        'deltafold_prompt_tokens_total{variant="sql"} 10.0',
        'deltafold_generation_tokens_total{variant="sql"} 16.0',
        'deltafold_time_to_first_token_seconds_count{variant="sql"} 2.0',
        'deltafold_inter_token_seconds_count{variant="sql"} 14.0',
        'deltafold_request_seconds_count{variant="sql"} 2.0',
        'deltafold_http_replies_total{route="/v1/completions",status="404"} 1.0',
        "deltafold_requests_waiting 2.0",
        "deltafold_steps_total 7.0",
        "deltafold_base_only_steps_total 3.0",
        "deltafold_batch_variants 1.0",
        "deltafold_kv_cache_usage_ratio 0.5",
        'deltafold_delta_resident_bytes{variant="sql"} 1000.0',
        'deltafold_memory_bytes{kind="deltas"} 1000.0',
    ):
        assert expected in lines
    assert "nope" not in reply.text
    assert any(line.startswith("deltafold_build_info{version=") for line in lines)


def test_variant_labels_are_capped_and_apps_do_not_collide(make_engine):
    first = create_app(make_engine(), max_variant_labels=1)
    with BackgroundServer(first) as one, BackgroundServer(create_app(make_engine())) as two:
        for model in ("law", "sql", "slow"):
            body = {**TEXT, "model": model, "max_tokens": 2}
            assert httpx.post(f"{one.url}/v1/completions", json=body).status_code == 200
        text = httpx.get(f"{one.url}/metrics").text
        assert 'deltafold_requests_total{finish_reason="length",variant="_other"} 2.0' in text
        assert 'deltafold_requests_total{finish_reason="length",variant="law"} 1.0' in text
        assert "deltafold_requests_total{" not in httpx.get(f"{two.url}/metrics").text


def test_openapi_document(http):
    document = http.get("/openapi.json").json()
    OpenAPI.model_validate(document)
    assert set(document["paths"]) == {
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/classify",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/version",
        "/metrics",
    }
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    used = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert used <= set(schemas)
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert "422" not in document["paths"]["/v1/completions"]["post"]["responses"]
    assert http.get("/docs").status_code == 200
    assert http.get("/version").json()["version"]


def test_engine_that_closes_fails_what_runs(make_engine, eventually):
    engine, replies = make_engine(), []
    body = {"model": "slow", "prompt": "x", "max_tokens": 400}
    with BackgroundServer(create_app(engine)) as server:
        ask = lambda: replies.append(httpx.post(f"{server.url}/v1/completions", json=body))  # noqa: E731
        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: engine.running == 1)
        engine.close()
        asking.join()
    assert error_of(replies[0], 503)["code"] == "shutting_down"


def test_a_taken_port_is_named():
    with bind("127.0.0.1", 0) as listener, pytest.raises(DeltafoldError) as caught:
        bind("127.0.0.1", listener.getsockname()[1])
    assert caught.value.code == "busy"
    assert "--port" in caught.value.fix
    with pytest.raises(DeltafoldError) as caught:
        bind("203.0.113.7", 0)
    assert caught.value.code == "bad-argument"


ODD = [None, True, -1, 1e308, 10**30, "", [None], [[1]], {"a": 1}]


@pytest.mark.parametrize(
    ("route", "schema", "body"),
    [
        ("/v1/chat/completions", ChatRequest, CHAT),
        ("/v1/completions", CompletionRequest, TEXT),
        ("/tokenize", TokenizeRequest, TEXT),
    ],
)
def test_odd_values_are_answered_or_refused_by_name(http, route, schema, body):
    for field in schema.model_fields:
        for value in ODD:
            reply = http.post(route, json={**body, field: value})
            assert reply.status_code in (200, 400, 404), (field, value, reply.text)
            if reply.status_code == 400 and "do not fit" not in reply.text:
                assert field in error_of(reply, 400)["message"]


def _text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _npy(array: np.ndarray, *, pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickle)
    return file.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        3,
        [],
        [1],
        "not base64!",
        _text_of(b"\x80\x02}q\x00."),
        _text_of(_npy(np.array([[{}]], dtype=object), pickle=True)),
        _text_of(_npy(np.zeros((2, 3), np.int64))),
        _text_of(_npy(np.zeros(3, np.float32))),
        _text_of(_npy(np.zeros((2, 3), np.float32))[:-1]),
        _text_of(_npy(np.zeros((2, 3), np.float32)).replace(b"(2, 3)", b"(9, 9)")),
        _text_of(b"\xff" * 64),
        _text_of(b"\x02" + bytes(7) + b"{}"),
    ],
)
def test_bad_prompt_embeds(http, value):
    body = {"model": "sql", "prompt_embeds": value}
    error = error_of(http.post("/v1/completions", json=body), 400)
    assert error["param"] == "prompt_embeds"


def test_prompt_embeds_stand_alone(http):
    good = _text_of(_npy(np.zeros((2, 3), np.float32)))
    both = {"model": "sql", "prompt_embeds": good, "prompt": "x"}
    assert error_of(http.post("/v1/completions", json=both), 400)["param"] == "prompt"
    echo = {"model": "sql", "prompt_embeds": good, "echo": True}
    error_of(http.post("/v1/completions", json=echo), 400)
