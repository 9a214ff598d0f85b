"""Tests against the real vLLM. They run in its own environment (`make test-vllm`), nowhere else."""

from __future__ import annotations

import importlib.util
import os

import pytest

_found = importlib.util.find_spec("vllm")
# This very folder is called vllm too, which makes it a namespace to whoever has no such package.
collect_ignore_glob = ["test_*"] if _found is None or _found.origin is None else []

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it brings warn of much that is not ours."""
    for item in items:
        if "tests/vllm" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session", autouse=True)
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One cache for all: engines live longer than a test."""
    home = str(tmp_path_factory.mktemp("home"))
    os.environ["DELTAFOLD_HOME"] = home
    return home
