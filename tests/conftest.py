"""What every test gets: a home of its own, no network, and tiny checkpoints on demand."""

from __future__ import annotations

import os

import pytest
import torch
from checkpoints import Pair, make_pair
from hypothesis import settings

settings.register_profile("deltafold", deadline=None, database=None, derandomize=True)
settings.load_profile("deltafold")
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    # Read once, when Triton is first imported, perhaps by another package: GPU kernels then run in
    # its interpreter, on tensors of the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def deltafold_home(tmp_path_factory, monkeypatch):
    """The cache of digests, empty and private to one test; compiled code is every test's."""
    home, native = tmp_path_factory.mktemp("home"), tmp_path_factory.getbasetemp() / "native"
    native.mkdir(exist_ok=True)
    (home / "native").symlink_to(native)
    monkeypatch.setenv("DELTAFOLD_HOME", str(home))
    for name in ("NO_COLOR", "DELTAFOLD_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def pair(tmp_path) -> Pair:
    """A base and a fine-tune of it, bf16, all kinds of tensors."""
    return make_pair(tmp_path)
