"""Mixed batches through the engine, deltas applied by the GPU kernels (interpreted without a GPU)."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
import zoo_models

from deltafold.runtime import EmbeddedEngine, Request, Sampling
from deltafold.runtime.batch import SlotBook
from deltafold.runtime.kernels.devices import applies_packed
from deltafold.runtime.loading import LoadedVariant

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from deltafold.runtime.kernels.triton.grouped import SlotTables
from deltafold.runtime.kernels.triton.layout import Kind

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
PLACES = [f"deltafold.runtime.{where}.applies_packed" for where in ("batch", "kernels.forms")]
PROMPT = "fox"
NEW = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    folder = tmp_path_factory.mktemp("zoo")
    # Qwen2 has biases, and a head that is tied to the embedding.
    return zoo_models.make(folder, "Qwen2", codecs=CODECS, step=0.1, **small)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in PLACES:
        monkeypatch.setattr(where, lambda device: True)


def answers(folder: Path, zoo: Path | None, requests: list[Request]) -> list[list[float]]:
    with EmbeddedEngine.open(folder, zoo=zoo, device=DEVICE, dtype="float32") as engine:
        outputs = list(engine.generate(requests))
    return [[token.logprob for token in out.logprobs] for out in outputs]


def test_a_mixed_batch_equals_restored_dense_models(
    made: zoo_models.Models, packed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: set[object] = set()
    refresh = SlotTables._fill

    def watched(layer: SlotTables, device: torch.device) -> None:
        refresh(layer, device)
        launched.update(layer._tables)

    monkeypatch.setattr(SlotTables, "_fill", watched)
    sampling = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True)
    names = ["base", *made.variants]
    mixed = answers(made.base, made.zoo, [Request(name, PROMPT, sampling) for name in names])
    for name, found in zip(names, mixed, strict=True):
        folder = made.base if name == "base" else made.dense / name
        (alone,) = answers(folder, None, [Request("base", PROMPT, sampling)])
        assert max(abs(a - b) for a, b in zip(found, alone, strict=True)) < 1e-4, name
    assert len({tuple(found) for found in mixed}) == len(mixed)
    # Signs by row group and by column, two kinds of codes, both sparse layouts, low rank and dense.
    kinds = {(key.bits, key.by_column) for key in launched if isinstance(key, Kind)}
    assert kinds == {(1, False), (1, True), (2, False)}
    assert {key for key in launched if not isinstance(key, Kind)} == {
        (0, 0),
        (16, 8),
        "low rank",
        "dense",
    }


def test_scales_and_mixtures_equal_those_of_dense_deltas(
    made: zoo_models.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True)
    half = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True, scale=0.5)
    requests = [
        Request("code3", PROMPT, half),
        Request("exact", PROMPT, half),
        Request("sign3*0.5+rank8*2", PROMPT, plain),
    ]
    seen = []
    for packed in (True, False):
        for where in PLACES:
            monkeypatch.setattr(where, lambda device, packed=packed: packed)
        seen.append(answers(made.base, made.zoo, requests))
    for here, there in zip(*seen, strict=True):
        assert max(abs(a - b) for a, b in zip(here, there, strict=True)) < 1e-4


def test_packed_forms_are_for_gpus_alone() -> None:
    assert not applies_packed(torch.device("cpu"))
    assert applies_packed(torch.device("cuda"))


def test_a_variant_keeps_its_slot_and_leaves_it_when_it_is_dropped() -> None:
    book = SlotBook()
    variants = [LoadedVariant(str(i), Path()) for i in range(9)]
    assert [book.of(v) for v in variants] == list(range(9))
    assert book.capacity == 16
    assert [book.of(v) for v in variants] == list(range(9))
    del variants[3]
    gc.collect()
    newcomer = LoadedVariant("new", Path())
    assert book.of(newcomer) == 3
    assert book.of(variants[-1]) == 8
