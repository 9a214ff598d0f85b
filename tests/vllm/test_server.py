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
import pytest
import zoo_models
from openai import APIStatusError, NotFoundError, OpenAI

TOKENS = 24


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    return engines.make(tmp_path_factory.mktemp("server"), "Llama")


@pytest.fixture(scope="module")
def address(made: zoo_models.Models, shared_home: str) -> Iterator[str]:
    port = free_port()
    words = [str(Path(sys.executable).with_name("deltafold")), "serve", str(made.base)]
    words += ["--zoo", str(made.zoo), "--engine", "vllm", "--port", str(port)]
    words += ["--dtype", "float32", "--max-model-len", "160", "--api-key", "secret", "--"]
    words += ["--enforce-eager", "--max-loras", "2", "--max-num-seqs", "8"]
    with (made.base.parent / "log").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, cwd=made.base.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(url, server, made.base.parent / "log")
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
    assert {model.id for model in client.models.list()} == {"base", *made.variants}
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
    with pytest.raises(NotFoundError):
        complete(client, "nobody", [1, 2, 3])
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
