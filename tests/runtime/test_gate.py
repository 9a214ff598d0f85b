"""No thread computes while transformers loads, and no two load at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import arch_table
import pytest
import torch
import transformers
from truth import moved

from deltafold.compress import Checkpoint, compress_checkpoint
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.gate import Gate


def test_computing_is_shared_and_loading_is_not() -> None:
    gate, inside, seen = Gate(), threading.Barrier(2), list[str]()

    def compute() -> None:
        with gate.computing():
            inside.wait(10)  # both are within it, or this times out

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(compute) for _ in range(2)]:
            future.result()
    begun, end = threading.Event(), threading.Event()

    def load(name: str) -> None:
        with gate.loading():
            begun.set()
            seen.append(f"{name} began")
            end.wait(10)
            seen.append(f"{name} ended")

    def late() -> None:
        with gate.computing():
            seen.append("computed")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(load, "first")
        assert begun.wait(10)
        others = [pool.submit(load, "second"), pool.submit(late)]
        end.set()
        for future in (first, *others):
            future.result()
    assert seen[:2] == ["first began", "first ended"]
    where = seen.index("second began")
    assert seen[where + 1] == "second ended"


def test_a_waiting_load_is_not_passed_by() -> None:
    gate, within, go = Gate(), threading.Event(), threading.Event()
    order: list[str] = []

    def compute() -> None:
        with gate.computing(), gate.computing():
            within.set()
            go.wait(10)
            with (
                gate.computing()
            ):  # begun within: it must not wait for the load, which waits for it
                order.append("computed")

    def load() -> None:
        with gate.loading(), gate.loading(), gate.computing():
            order.append("loaded")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(compute)
        assert within.wait(10)
        loading = pool.submit(load)
        while not gate._waiting:
            pass
        after = pool.submit(compute)
        go.set()
        for future in (first, loading, after):
            future.result(10)
    assert order == ["computed", "loaded", "computed"]


def test_a_load_within_a_computation_is_a_mistake() -> None:
    gate = Gate()
    with gate.computing(), pytest.raises(AssertionError), gate.loading():
        pass
    with gate.loading():
        pass


def test_rebuilding_in_many_threads_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    """transformers' loader lends its classes other methods, and torch another default dtype."""
    family = next(f for f in arch_table.FAMILIES if f.name == "Mamba")
    model = family.build().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    names = [f"v{i}" for i in range(6)]
    for seed, name in enumerate(names):
        kind = transformers.AutoModelForCausalLM
        moved(kind.from_pretrained(tmp_path / "base"), seed=seed).save_pretrained(tmp_path / name)
        compress_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / "zoo" / name)
    before = transformers.PreTrainedModel.tie_weights, torch.get_default_dtype()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    deltas = Deltas(base, Checkpoint.open(tmp_path / "base"), tmp_path / "zoo", rebuild="auto")
    with ThreadPoolExecutor(6) as pool:
        variants = list(pool.map(deltas.acquire, names))
    assert (transformers.PreTrainedModel.tie_weights, torch.get_default_dtype()) == before
    for variant in variants:
        assert variant is not None
        assert variant.model.lm_head.weight is variant.model.backbone.embeddings.weight
