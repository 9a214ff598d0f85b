"""`deltafold chat` against a running server."""

from __future__ import annotations

import builtins
import sys

import pytest
from click.testing import CliRunner

from deltafold.compress.errors import DeltafoldError
from deltafold.server.app import create_app
from deltafold.server.cli.chat import chat
from deltafold.server.client import Client
from deltafold.server.run import BackgroundServer, bind, url_of


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("DELTAFOLD_API_KEY", raising=False)


def talk(url, lines, *options):
    return CliRunner().invoke(chat, ["--url", url, *options], input=lines)


def error_of(result, code):
    assert isinstance(result.exception, DeltafoldError), result.output
    assert result.exception.code == code
    return result.exception


def test_each_line_is_answered_and_switching_keeps_the_history(url, engine):
    result = talk(url, "hi\n\n/model sql\nyou\n/reset\nnew\n")
    assert result.exit_code == 0
    assert result.stdout == "hi\nHI HI YOU\nNEW\n"
    assert "now talking to sql" in result.stderr
    said = [[message["content"] for message in r.prompt] for r in engine.requests]
    assert said == [["hi"], ["hi", "hi", "you"], ["new"]]


def test_options_and_quit(url, engine):
    options = ("--model", "law", "--max-tokens", "2", "--temperature", "0")
    result = talk(url + "/v1/", "abc\n/quit\nnever\n", *options)
    assert result.stdout == "cb\n"
    assert engine.requests[0].sampling.max_tokens == 2


def test_models_marks_the_current_one(url):
    lines = talk(url, "/models\n", "--model", "sql").stdout.splitlines()
    assert lines[0] == "  base"
    assert "* sql" in lines
    assert "/reset" in talk(url, "/help\n").stdout


def test_failures_end_piped_input(url):
    assert "sql, law" in error_of(talk(url, "/model sqk\n"), "variant-not-found").message
    error_of(talk(url, "", "--model", "sqk"), "variant-not-found")
    error_of(talk(url, "/dance\n"), "bad-argument")
    assert "500" in error_of(talk(url, "x\n", "--model", "crash"), "busy").message
    error_of(talk(url, "x" * 600 + "\n"), "bad-argument")
    result = talk(url, "hello\n", "--model", "dies-later")
    error_of(result, "busy")
    assert result.stdout == "he\n"


def test_nobody_listens():
    with bind("127.0.0.1", 0) as listener:
        url = url_of(listener)
    error = error_of(talk(url, "hi\n"), "not-found")
    assert url in error.message
    assert "deltafold serve" in error.fix


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://["])
def test_bad_addresses(url):
    error_of(talk(url, ""), "bad-argument")


def test_a_server_with_keys(engine):
    with BackgroundServer(create_app(engine, api_keys=["secret"])) as server:
        error = error_of(talk(server.url, "hi\n"), "bad-argument")
        assert "--api-key" in error.fix
        assert talk(server.url, "hi\n", "--api-key", "secret").stdout == "hi\n"


def test_proxies_of_the_environment_are_not_asked_for_this_machine(url, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Client(url).models()[0] == "base"


def test_a_terminal_survives_failures(url, monkeypatch, capsys):
    lines = iter(["hi", "/model sqk", "/model sql", "you"])

    def typed(prompt):
        print(prompt, end="")
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    chat.main(["--url", url], standalone_mode=False)
    captured = capsys.readouterr()
    assert captured.out == "base> hi\nbase> base> sql> HI HI YOU\nsql> \n"
    assert "variant-not-found" in captured.err
