"""`deltafold serve`: what it refuses, and a whole life from start to signal in a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from checkpoints import write_checkpoint
from click.testing import CliRunner

import deltafold.runtime
from deltafold.compress.errors import DeltafoldError
from deltafold.server.app import create_app
from deltafold.server.cli.serve import ready_text, serve
from deltafold.server.run import BackgroundServer, bind

SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("scripted", sys.argv[1])
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)
class Engine(scripted.ScriptedEngine):
    @classmethod
    def open(cls, base, **options):
        print("options", sorted(options.items()), flush=True)
        return cls()
    def close(self):
        super().close()
        print("engine closed", flush=True)
import deltafold.runtime
deltafold.runtime.EmbeddedEngine = Engine
from deltafold.server.cli.serve import serve
serve(sys.argv[2:])
"""


def run(*arguments: str):
    return CliRunner().invoke(serve, ["base/", "--zoo", "zoo/", *arguments])


def error_of(result, code: str) -> DeltafoldError:
    assert isinstance(result.exception, DeltafoldError), result.output
    assert result.exception.code == code
    return result.exception


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("DELTAFOLD_API_KEY", raising=False)


class Opener:
    """Stands in for the real engine's class."""

    def __init__(self, result: object) -> None:
        self.result = result

    def open(self, base: str, **options: object) -> object:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_no_key_no_neighbours(host):
    error = error_of(run("--host", host), "bad-argument")
    assert "--api-key" in error.fix
    assert host in error.message


def test_an_empty_key_is_refused():
    error_of(run("--api-key", ""), "bad-argument")
    error_of(run("--api-key", "good", "--api-key", " "), "bad-argument")


def test_a_taken_port_fails_before_the_base_is_read():
    with bind("127.0.0.1", 0) as listener:
        error = error_of(run("--port", str(listener.getsockname()[1])), "busy")
    assert "--port" in error.fix


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = error_of(run(), "missing-extra")
    assert "uvicorn" in error.message
    assert error.fix == "pip install 'deltafold[serve]'"


def test_a_base_that_cannot_be_loaded_ends_the_server(monkeypatch):
    failure = DeltafoldError("not-a-checkpoint", "base/ holds no model")
    monkeypatch.setitem(vars(deltafold.runtime), "EmbeddedEngine", Opener(failure))
    assert run("--port", "0", "--runner", "generate").exception is failure


@pytest.mark.parametrize(
    ("architecture", "runner", "opened"),
    [
        ("LlamaForCausalLM", "auto", "EmbeddedEngine"),
        ("LlamaForCausalLM", "pooling", "PoolingEngine"),
        ("BertForMaskedLM", "auto", "PoolingEngine"),
        ("ViTModel", "auto", "PoolingEngine"),
        # It writes with a memory that is no cache.
        ("XLNetLMHeadModel", "auto", "PoolingEngine"),
    ],
)
def test_the_base_decides_which_engine(monkeypatch, tmp_path, architecture, runner, opened):
    kind = re.match("Llama|Bert|ViT|XLNet", architecture)[0].lower()
    config = {"model_type": kind, "architectures": [architecture]}
    write_checkpoint(tmp_path / "base", {"w": torch.zeros(1)}, config=config)
    for name in ("EmbeddedEngine", "PoolingEngine"):
        failure = DeltafoldError("not-found", name)
        monkeypatch.setitem(vars(deltafold.runtime), name, Opener(failure))
    arguments = [str(tmp_path / "base"), "--zoo", "zoo/", "--port", "0", "--runner", runner]
    result = CliRunner().invoke(serve, arguments)
    assert error_of(result, "not-found").message == opened


def test_ready_text_names_some_variants(engine):
    text = ready_text("http://x", engine, has_key=True)
    assert "law" in text
    assert "org/tiny" in text
    assert "Bearer $DELTAFOLD_API_KEY" in text
    assert "Bearer" not in ready_text("http://x", engine, has_key=False)


def test_two_servers_in_one_process(make_engine):
    with (
        BackgroundServer(create_app(make_engine())) as one,
        BackgroundServer(create_app(make_engine())) as two,
    ):
        assert one.url != two.url
        for server in (one, two):
            assert httpx.get(f"{server.url}/ready").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{one.url}/health")


@pytest.fixture
def served() -> Iterator[subprocess.Popen[str]]:
    conftest = Path(__file__).with_name("conftest.py")
    options = ["base/", "--zoo", "zoo/", "--port", "0", "--max-batch", "4", "--no-strict"]
    options += ["--runner", "generate"]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(conftest), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DELTAFOLD_API_KEY": "from-the-environment"},
    )
    with process:
        yield process
        process.kill()


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"the process ended without {pattern!r}: {seen}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_life(served, number):
    url = read_until(served, r"is ready at (http://127.0.0.1:\d+)")[1]
    body = {"model": "slow", "prompt": "x", "max_tokens": 30, "stream": True}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
    headers = {"authorization": "Bearer from-the-environment"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        served.send_signal(number)
        # What runs is finished.
        assert [line for line in lines if line][-1] == "data: [DONE]"
    output, errors = served.communicate(timeout=20)
    assert served.returncode == 0
    assert "deltafold stopped" in errors
    assert "Traceback" not in errors
    assert output.splitlines() == [
        "options [('device', 'auto'), ('dtype', 'auto'), ('max_batch', 4),"
        " ('rebuild', 'auto'), ('served_model_name', None), ('strict', False), ('zoo', 'zoo/')]",
        "engine closed",
    ]
