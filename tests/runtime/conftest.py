"""Engines on a tiny model whose host counts what is acquired and released."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico
import pytest

from deltafold.runtime.embedded import EmbeddedEngine


@pytest.fixture(autouse=True)
def packed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DELTAFOLD_TEST_PACKED=1 the GPU kernels apply the deltas in every test of the runtime."""
    if os.environ.get("DELTAFOLD_TEST_PACKED") == "1":
        for where in ("batch", "kernels.forms"):
            monkeypatch.setattr(f"deltafold.runtime.{where}.applies_packed", lambda device: True)


@pytest.fixture
def host(tmp_path: Path) -> pico.PicoHost:
    return pico.PicoHost(pico.llama(), tmp_path, ["a", "b"])


@pytest.fixture
def start(host: pico.PicoHost) -> Iterator[Callable[..., EmbeddedEngine]]:
    engines = []

    def make(**options: Any) -> EmbeddedEngine:
        engines.append(EmbeddedEngine(host.model, host, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    assert not +host.held, "every acquired variant is released once"
