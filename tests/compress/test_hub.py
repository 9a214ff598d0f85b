"""Hub ids, through huggingface_hub itself.

Offline on a cache folder laid out as it lays it out, or with a hub on this machine (`hub.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from hub import Hub, serving
from safetensors.torch import load_file

from deltafold.compress import compress_checkpoint, verify_delta
from deltafold.compress.delta_files import delta_files

PROGRAM = "from deltafold.server.cli.main import main; main()"
COMMIT = "0e9e39f2" + "0" * 32


def cached(home: Path, repo: str, checkpoint: Path) -> None:
    """Put a checkpoint into a hub cache as `repo`'s main revision."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    shutil.copytree(checkpoint, folder / "snapshots" / COMMIT)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    noise = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(8, 16, generator=noise), "b.bias": torch.ones(8)}
    tuned = {k: v + 0.01 for k, v in base.items()}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    cached(tmp_path / "hf", "org/base", tmp_path / "base")
    cached(tmp_path / "hf", "org/tuned", tmp_path / "tuned")
    return tmp_path


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )


def talk(home: Path, hub: Hub | None, *commands: str) -> list[tuple[int, dict[str, Any]]]:
    """Exit status and JSON of each command; one process, whose client knows this hub alone."""
    environment = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    if hub is not None:
        there = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test"}
        environment |= {**there, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    code = """
import sys
from click.testing import CliRunner
from deltafold.server.cli.main import cli
for line in sys.argv[1:]:
    done = CliRunner().invoke(cli, [*line.split(), "--json"])
    print(done.exit_code, done.stdout.strip())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *commands],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=True,
    )
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return [(int(status), json.loads(text)) for status, _, text in lines]


def test_pack_and_restore_by_hub_id(home: Path) -> None:
    packed = run(home, "compress", "org/base", "org/tuned@main", "-o", "d", "--codec", "lossless")
    assert packed.returncode == 0, packed.stdout + packed.stderr
    manifest = json.loads((home / "d" / "delta_config.json").read_text())
    assert manifest["base"]["name"] == "org/base"
    assert manifest["base"]["revision"] == COMMIT
    restored = run(home, "restore", "d", "--base", "hf://org/base", "-o", "back")
    assert restored.returncode == 0, restored.stdout + restored.stderr
    back, tuned = (load_file(home / f / "model.safetensors") for f in ("back", "tuned"))
    assert all(torch.equal(back[name], tuned[name]) for name in tuned)


def test_a_repo_that_is_not_there(home: Path) -> None:
    done = run(home, "compress", "org/base", "org/missing", "-o", "d")
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"]["code"] == "not-found"
    assert not (home / "d").exists()


def test_a_delta_goes_to_the_hub_and_comes_back(home: Path) -> None:
    (home / "tuned" / "LICENSE").write_text("free")
    delta = home / "sql"
    compress_checkpoint(home / "base", home / "tuned", delta)
    (delta / "extra.partial").write_text("no part of it")
    damaged = shutil.copytree(delta, home / "damaged")
    raw = bytearray((damaged / "delta.safetensors").read_bytes())
    raw[-1] ^= 1
    (damaged / "delta.safetensors").write_bytes(raw)
    cut = {name: (delta / name).read_bytes() for name in delta_files(delta)}
    with serving() as hub:
        hub.branches["org/cut", "main"] = {**cut, "delta.safetensors": b"nonsense"}
        listed, refused, sent, branch, got, bad = talk(
            home,
            hub,
            "push sql org/dry --dry-run",
            "push damaged org/damaged",
            "push sql org/sql --private",
            "push sql org/sql --revision next",
            "pull org/sql@next --zoo zoo --name mine",
            "pull org/cut -o bad",
        )
        assert refused[1]["error"]["code"] == "checksum"
        assert not [path for path in hub.asked if "dry" in path or "damaged" in path]
        assert (sent[0], branch[0], got[0]) == (0, 0, 0), (sent, branch, got)
        assert hub.private == {"org/sql": True}
        files = hub.branches["org/sql", "main"]
        assert files == {name: (delta / name).read_bytes() for name in delta_files(delta)}
        assert files == hub.branches["org/sql", "next"]
        assert listed[1]["files"] == {n: len(b) for n, b in files.items()}
        assert {"LICENSE", "README.md", "delta.safetensors"} < set(files)
        assert verify_delta(home / "zoo" / "mine", base=home / "base").base_checked
        assert got[1]["delta_id"] == sent[1]["delta_id"]
        assert bad[1]["error"]["code"] == "truncated"
        assert not (home / "bad").exists()
    cached, offline = talk(home, None, "pull org/sql@next -o cached", "push sql org/sql")
    assert cached[0] == 0, cached
    assert verify_delta(home / "cached").coded
    assert offline[0] == 4
    assert "HF_HUB_OFFLINE" in offline[1]["error"]["fix"]
