"""Hub ids, through huggingface_hub itself, offline, on a cache folder laid out as it lays it out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file

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
