"""The commands around zoos: what they print, and their exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from packing import pack

from deltafold.server.cli.main import cli


def run(*args, status: int = 0):
    result = CliRunner().invoke(cli, [str(a) for a in args], env={"DELTAFOLD_PROGRESS": "0"})
    assert result.exit_code == status, result.output
    return result


def run_json(*args, status: int = 0):
    return json.loads(run(*args, "--json", status=status).stdout)


@pytest.fixture
def zoo(pair) -> Path:
    pack(pair)
    folder = pair.root / "zoo"
    assert "verified and added" in run("zoo", "add", folder, pair.out, "--name", "sql").stdout
    return folder


def test_blue_and_green(pair, zoo):
    added = run_json("zoo", "add", zoo, pair.out, "--name", "new", "--move")
    assert not pair.out.exists()
    assert run_json("zoo", "alias", zoo, "prod", "new")["delta_id"] == added["delta_id"]
    for wrong in ((), ("new", "--rm")):
        run("zoo", "alias", zoo, "prod", *wrong, status=2)
    text = run("zoo", "list", zoo).stdout
    for part in ("2 variants", "new", "prod", "bitdelta:bits=4,group=128", added["delta_id"][7:15]):
        assert part in text
    listed = run_json("zoo", "list", zoo)["variants"]
    assert [(v["name"], v["aliases"], v["ok"]) for v in listed] == [
        ("new", ["prod"], True),
        ("sql", ["prod"], True),
    ]
    run("zoo", "rm", zoo, "sql")
    assert run_json("zoo", "rm", zoo, "new", status=2)["error"]["code"] == "busy"
    assert run_json("zoo", "rm", zoo, "new", "--force")["aliases"] == ["prod"]
    assert run_json("zoo", "alias", zoo, "prod", "--rm", status=4)["error"]["code"]


def test_verifying_and_collecting(pair, zoo):
    run("zoo", "add", zoo, pair.out, "--name", "twin")
    planned = run_json("zoo", "gc", zoo, "--dry-run", "--min-bytes", "1")
    done = run_json("zoo", "gc", zoo, "--min-bytes", "1")
    assert done["freed"] > 0
    assert list(done["shared"]) == list(planned["shared"]) == ["sql, twin"]
    assert "0 bytes" in run("zoo", "gc", zoo).stdout
    assert run_json("zoo", "verify", zoo, "--base", pair.base)["ok"]
    run("zoo", "verify", zoo, "--full", status=2)
    (zoo / "twin" / "config.json").write_text("{}")
    data = run_json("zoo", "verify", zoo, status=3)
    assert [v["ok"] for v in data["variants"]] == [True, False]
    text = run("zoo", "verify", zoo, status=3).stdout
    assert "error[truncated]" in text
    assert "twin  delta  truncated" in text


def test_report(pair, zoo):
    page = pair.root / "r.html"
    assert str(page) in run("report", zoo / "sql", "-o", page).stdout
    data = run_json("report", zoo, "-o", page, "--svg-dir", pair.root / "svg")
    assert [Path(p).name for p in data["pictures"]] == ["bytes.svg"]
    assert run_json("report", pair.root / "none", "-o", page, status=4)["error"]["code"]


def test_pull_and_push_say_what_does_not_go_together(pair, zoo):
    run("pull", "org/x", "-o", "a", "--zoo", "b", status=2)
    run("pull", "org/x", "--name", "b", status=2)
    for wrong in (("pull", zoo / "sql"), ("push", zoo / "sql", "./x")):
        assert run_json(*wrong, status=2)["error"]["code"] == "bad-argument"
    assert "delta.safetensors" in run("push", zoo / "sql", "org/x", "--dry-run").stdout


def test_a_zoo_where_a_delta_is_asked_for(zoo):
    error = run_json("verify", zoo, status=3)["error"]
    assert error["code"] == "not-a-delta"
    assert str(zoo / "sql") in error["fix"]
