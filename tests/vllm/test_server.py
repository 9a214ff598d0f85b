"""vLLM's OpenAI server with a zoo, asked by the official client."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engines
import failures
import pytest
import talker
import zoo_models
from openai import APIStatusError, NotFoundError, OpenAI

TOKENS = 24


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    models = engines.make(tmp_path_factory.mktemp("server"), "Llama", vocab_size=136)
    talker.make(models.base.parent)
    return models


@pytest.fixture(scope="module")
def log(made: zoo_models.Models) -> Path:
    return made.base.parent / "log"


@pytest.fixture(scope="module")
def address(made: zoo_models.Models, log: Path, shared_home: str) -> Iterator[str]:
    port = free_port()
    words = [str(Path(sys.executable).with_name("deltafold")), "serve", str(made.base)]
    words += ["--zoo", str(made.zoo), "--engine", "vllm", "--port", str(port)]
    words += ["--dtype", "float32", "--max-model-len", "160", "--api-key", "secret"]
    words += ["--max-deltas", "2", "--pin", "int4", "--", "--enforce-eager", "--max-loras", "2"]
    words += ["--max-num-seqs", "8", "--block-size", "32"]
    with log.open("w") as written:
        server = subprocess.Popen(words, stdout=written, stderr=written, cwd=made.base.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(url, server, log)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text("utf-8")[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(log.read_text("utf-8")[-4000:])


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as made:
        yield made


def complete(client: OpenAI, model: str, prompt: list[int]) -> tuple[str, list[float]]:
    out = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True},
    )
    assert out.choices[0].logprobs is not None
    return out.choices[0].text, list(out.choices[0].logprobs.token_logprobs or [])


def post(address: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{address}{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": "Bearer secret"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_names_of_the_zoo_are_served_from_the_first_request(made, address, client):
    listed = list(client.models.list())
    assert {model.id for model in listed} == {"base", "talker", *made.variants}
    loaded = [model.id for model in listed if "#sha256" in getattr(model, "root", "")]
    assert loaded == ["int4"], (
        "a pinned variant is there from the start, others come when asked for"
    )
    alone = {
        name: [complete(client, name, p) for p in engines.PROMPTS]
        for name in ("base", *made.variants)
    }
    texts = {str([text for text, _ in answers]) for answers in alone.values()}
    assert len(texts) == len(alone), "variants must differ, or nothing is proved"
    jobs = [(n, i) for _ in range(2) for i in range(len(engines.PROMPTS)) for n in alone]

    def one(job: tuple[str, int]) -> bool:
        text, logprobs = complete(client, job[0], engines.PROMPTS[job[1]])
        expected, wanted = alone[job[0]][job[1]]
        apart = max(abs(a - b) for a, b in zip(logprobs, wanted, strict=True))
        return text == expected and apart < 1e-4

    # Loads and unloads while others stream.
    with ThreadPoolExecutor(13) as pool:
        running = [pool.submit(one, job) for job in jobs]
        for number in range(3):
            path = str(made.zoo / made.variants[number])
            loading = pool.submit(
                post, address, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path}
            )
            assert loading.result()[0] == 200, loading.result()
            own = complete(client, "x", engines.PROMPTS[0])
            assert own[0] == alone[made.variants[number]][0][0]
            assert post(address, "/v1/unload_lora_adapter", {"lora_name": "x"})[0] == 200
        assert all(task.result() for task in running)
    with pytest.raises(NotFoundError):
        complete(client, "x", engines.PROMPTS[0])


@pytest.mark.slow
def test_a_variant_speaks_with_its_own_tokenizer_template_and_end(made, address, client):
    """All of them differ from the base's, and every answer is what transformers makes of them."""
    own = talker.Dense(made.base.parent)
    chat = [{"role": "user", "content": "hello"}]
    prompt = own.render(chat)
    expected = own.generate(prompt)
    assert expected[-1] == own.end, "it must end by its own end token, or nothing is proved"
    for stream in (False, True):
        text, reason = said(client, "talker", chat, stream=stream, temperature=0)
        assert (text, reason) == (own.decode(expected), "stop")
    assert said(client, "base", chat, temperature=0, max_tokens=12)[1] == "length"

    # Its generation config is greedy and short, the base's is neither.
    assert said(client, "talker", chat) == (own.decode(expected), "stop")
    long = client.completions.create(model="talker", prompt="x" + talker.TURN, temperature=0)
    assert long.usage is not None
    assert long.usage.prompt_tokens == 2
    assert long.usage.completion_tokens <= talker.MOST
    body = {"model": "talker", "messages": chat, "add_generation_prompt": True}
    status, tokens = post(address, "/tokenize", body)
    assert (status, json.loads(tokens)["tokens"]) == (200, prompt)
    status, text = post(address, "/detokenize", {"model": "talker", "tokens": prompt[:3]})
    assert talker.TURN in json.loads(text)["prompt"]

    # Answers are held to a grammar by the base's tokenizer, in the engine: refused, not wrong.
    with pytest.raises(APIStatusError, match="grammar") as caught:
        said(client, "talker", chat, response_format={"type": "json_object"})
    assert caught.value.status_code == 400
    with pytest.raises(APIStatusError, match="out of vocabulary"):
        complete(client, "talker", [made_rows(made)])


def made_rows(made: zoo_models.Models) -> int:
    config = json.loads((made.base / "config.json").read_text("utf-8"))
    return int(config["vocab_size"])


def said(client: OpenAI, model: str, messages: Any, **given: Any) -> tuple[str, str]:
    out = client.chat.completions.create(model=model, messages=messages, **given)
    if not given.get("stream"):
        text, reason = out.choices[0].message.content or "", out.choices[0].finish_reason
    else:
        chunks = [c.choices[0] for c in out if c.choices]
        text = "".join(c.delta.content or "" for c in chunks)
        reason = str(chunks[-1].finish_reason)
    return text.lstrip(), reason  # vLLM writes a space first where a tokenizer has no decoder


@pytest.mark.slow
def test_what_is_unloaded_is_let_go_of(made, address, client):
    """Files of a variant stay open for as long as it has a name, or runs, and no longer."""
    place = shutil.copytree(made.zoo / "exact", made.zoo / "passing")
    body = {"lora_name": "passing", "lora_path": str(place)}
    assert post(address, "/v1/load_lora_adapter", body)[0] == 200
    assert holders(place)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete, client, "passing", engines.LONG)
        expected = complete(client, "exact", engines.LONG)
        assert post(address, "/v1/unload_lora_adapter", {"lora_name": "passing"})[0] == 200
        assert running.result()[0] == expected[0]
    shutil.rmtree(place)
    wait_for(lambda: not holders(place), f"{place} is still open")


def holders(folder: Path) -> list[str]:
    """Processes that hold a file of a folder open, or in memory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = [(process / "maps").read_text()]
            held += [str(f.readlink()) for f in (process / "fd").iterdir()]
        except OSError:
            continue  # it ended
        if any(str(folder) in text for text in held):
            found.append(process.name)
    return found


def wait_for(condition: Any, what: str) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(what)


@pytest.mark.slow
def test_a_chat_goes_to_its_variant(made, client):
    said = {}
    for name in ("base", "exact"):
        out = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
        )
        said[name] = out.choices[0].message.content
    assert said["base"] != said["exact"]


@pytest.mark.slow
def test_what_is_wrong_is_told_to_its_client_alone(made, address, client, tmp_path):
    outside = shutil.copytree(made.zoo / "exact", tmp_path / "outside")
    status, text = post(
        address, "/v1/load_lora_adapter", {"lora_name": "y", "lora_path": str(outside)}
    )
    assert status == 400
    assert "only deltas of the zoo" in text
    broken = shutil.copytree(made.zoo / "exact", made.zoo / "broken")
    payload = broken / "delta.safetensors"
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(raw)
    with pytest.raises(APIStatusError, match="checksum") as caught:
        complete(client, "broken", [1, 2, 3])
    assert caught.value.status_code == 400
    with pytest.raises(NotFoundError, match="near names  sign1"):
        complete(client, "sign2", [1, 2, 3])
    assert complete(client, "sign1", [1, 2, 3])[0]

    # Replaced in place and loaded again: a new variant, and nothing of the old one's prefix cache.
    moved = shutil.copytree(made.zoo / "int4", made.zoo / "moving")
    first = complete(client, "moving", engines.LONG)
    assert first[0] == complete(client, "int4", engines.LONG)[0]
    shutil.rmtree(moved)
    shutil.copytree(made.zoo / "rank8", moved)
    again = {"lora_name": "moving", "lora_path": str(moved), "load_inplace": True}
    assert post(address, "/v1/load_lora_adapter", again)[0] == 200
    second = complete(client, "moving", engines.LONG)
    assert second[0] == complete(client, "rank8", engines.LONG)[0] != first[0]


@pytest.mark.slow
def test_each_failure_is_its_own_clients_beside_a_stream(made, address, client, tmp_path):
    """What the engine survives, asked for over HTTP: nobody else hears of it."""
    expected = complete(client, "sign1", engines.LONG)[0]
    foreign = engines.make(tmp_path, "Llama", {"foreign": "lossless"}, initializer_range=0.1)
    shutil.copytree(foreign.zoo / "foreign", made.zoo / "foreign")
    failures.resized(made.base.parent, made.zoo / "resized")
    for name in ("removed", "overwritten"):
        shutil.copytree(made.zoo / "rank8", made.zoo / name)
        assert complete(client, name, [1, 2, 3]) == complete(client, "rank8", [1, 2, 3])
    shutil.rmtree(made.zoo / "removed")
    flipped = made.zoo / "overwritten"
    failures.overwrite(flipped, lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    for name in ("sign1", "exact", "dare"):  # more than stay in memory: both leave it
        complete(client, name, [1, 2, 3])

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            lambda: [complete(client, "sign1", engines.LONG)[0] for _ in range(8)]
        )
        body = {"lora_name": "nowhere", "lora_path": str(made.zoo / "nowhere")}
        status, text = post(address, "/v1/load_lora_adapter", body)
        assert (status, "not-found" in text) == (400, True)
        for name, told in (
            ("foreign", "base-mismatch"),
            ("resized", "lm_head.weight has another shape"),
            ("overwritten", "checksum"),
        ):
            with pytest.raises(APIStatusError, match=told) as caught:
                complete(client, name, [1, 2, 3])
            assert caught.value.status_code == 400
        assert complete(client, "removed", [1, 2, 3]) == complete(client, "rank8", [1, 2, 3])
        assert running.result() == [expected] * 8
