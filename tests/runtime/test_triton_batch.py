"""Mixed batches through the engine with deltas applied by the GPU kernels (interpreted without a GPU)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo_models

from deltafold.runtime import EmbeddedEngine, Request, Sampling
from deltafold.runtime.batch import BatchState, SlotBook
from deltafold.runtime.kernels import devices
from deltafold.runtime.kernels.base import leaves

pytest.importorskip("triton", reason="Triton exists for Linux alone")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODECS = {
    "sign3": "bitdelta:bits=3,group=32",
    "code3": "int:bits=3",
    "column": "bitdelta:scale=column",
    "sparse": "dare:drop=0.9",
    "strata": "stratified",
    "rank8": "svd:rank=8",
    "exact": "lossless",
}
PROMPT = "a fox"
NEW = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    folder = tmp_path_factory.mktemp("zoo")
    # Qwen2 has biases, and a head that is tied to the embedding.
    return zoo_models.make(folder, "Qwen2", codecs=CODECS, step=0.1, **small)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("batch", "kernels.forms"):
        monkeypatch.setattr(f"deltafold.runtime.{where}.applies_packed", lambda device: True)


def _answers(folder: Path, zoo: Path | None, requests: list[Request]) -> list[list[float]]:
    with EmbeddedEngine.open(folder, zoo=zoo, device=DEVICE, dtype="float32") as engine:
        outputs = list(engine.generate(requests))
        if zoo is not None:
            state = engine
            assert state is not None
    return [[t.logprob for t in out.logprobs] for out in outputs]


def test_a_mixed_batch_equals_restored_dense_models(
    made: zoo_models.Models, packed: None
) -> None:
    sampling = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True)
    half = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True, scale=0.5)
    names = ["base", *made.variants]
    requests = [Request(name, PROMPT, sampling) for name in names]
    requests += [Request("code3", PROMPT, half), Request("sign3*0.5+rank8*2", PROMPT, sampling)]
    mixed = _answers(made.base, made.zoo, requests)
    for name, found in zip(names, mixed, strict=False):
        folder = made.base if name == "base" else made.dense / name
        (alone,) = _answers(folder, None, [Request("base", PROMPT, sampling)])
        assert max(abs(a - b) for a, b in zip(found, alone, strict=True)) < 1e-4, name
    assert len({tuple(found) for found in mixed}) == len(mixed)


def test_scales_and_mixtures_equal_those_of_dense_deltas(
    made: zoo_models.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True, scale=0.5)
    plain = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True)
    requests = [
        Request("code3", PROMPT, sampling),
        Request("exact", PROMPT, sampling),
        Request("sign3*0.5+rank8*2", PROMPT, plain),
    ]
    seen = []
    for packed in (True, False):
        for where in ("batch", "kernels.forms"):
            name = f"deltafold.runtime.{where}.applies_packed"
            monkeypatch.setattr(name, lambda device, packed=packed: packed)
        seen.append(_answers(made.base, made.zoo, requests))
    for here, there in zip(*seen, strict=True):
        assert max(abs(a - b) for a, b in zip(here, there, strict=True)) < 1e-4
