"""Imported LoRAs share batches with all else, and a zoo may hold LoRA folders themselves."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models
from adapters import factors, write_adapter

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    DeltaRepo,
    import_lora,
    restore_checkpoint,
)
from deltafold.compress.fingerprint import digest_source
from deltafold.compress.lora import cached_lora
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.host import Row
from deltafold.runtime.zoo import Zoo

LAYER = "model.layers.1"


def adapter(folder: Path, seed: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """A LoRA of two linear layers and the embedding, with a norm of its own; and its merged step."""
    up = factors(f"{LAYER}.mlp.up_proj", 128, 64, seed=seed)
    query = factors(f"{LAYER}.self_attn.q_proj", 64, 64, seed=seed + 1)
    table = {
        f"model.embed_tokens.lora_embedding_{part}": value
        for part, value in zip("AB", factors("x", 64, 128, seed=seed + 2).values(), strict=True)
    }
    norm = torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.5
    write_adapter(
        folder, up | query | table | {"model.norm.weight": norm}, modules_to_save=["norm"]
    )
    a, b = table.values()
    steps = {
        f"{module}.weight": 2
        * tensors[f"{module}.lora_B.weight"]
        @ tensors[f"{module}.lora_A.weight"]
        for module, tensors in ((f"{LAYER}.mlp.up_proj", up), (f"{LAYER}.self_attn.q_proj", query))
    }
    return folder, {**steps, "model.embed_tokens.weight": 2 * (b @ a).T, "model.norm.weight": norm}


def dense(models: zoo_models.Models, steps: dict[str, torch.Tensor]) -> Any:
    """The base with an adapter merged by hand."""
    model = models.plain()
    with torch.no_grad():
        for name, step in steps.items():
            parameter = model.get_parameter(name)
            parameter.copy_(step if name == "model.norm.weight" else parameter + step)
    return model


@pytest.fixture
def models(tmp_path: Path) -> zoo_models.Models:
    return zoo_models.make(tmp_path, codecs={"sign1": "bitdelta"})


def test_an_adapter_that_unties_the_head_is_served_from_its_folder(tmp_path: Path) -> None:
    """PEFT trains table and output layer apart where both are saved; neither must move the other."""
    models = zoo_models.make(tmp_path, "Qwen2", codecs={"sign1": "bitdelta"})
    noise = torch.Generator().manual_seed(7)
    saved = {n: torch.randn(128, 64, generator=noise) for n in ("model.embed_tokens", "lm_head")}
    write_adapter(
        models.zoo / "apart",
        factors(f"{LAYER}.self_attn.q_proj", 64, 64)
        | {f"{name}.weight": value for name, value in saved.items()},
        modules_to_save=["embed_tokens", "lm_head"],
    )
    model = models.plain()
    deltas = Deltas(model, Checkpoint.open(models.base), models.zoo)
    rows = [Row(deltas.acquire(name)) for name in ("apart", "base", "sign1", "apart")]
    ids = torch.randint(0, 128, (len(rows), 7), generator=noise)
    with torch.inference_mode(), deltas.batch(rows):
        mixed = model(ids).logits
    restore_checkpoint(
        cached_lora(Checkpoint.open(models.base), models.zoo / "apart"),
        models.base,
        tmp_path / "restored",
        dtype=torch.float32,
    )
    dense = type(model).from_pretrained(tmp_path / "restored", dtype=torch.float32).eval()
    assert not dense.config.tie_word_embeddings
    for name, value in saved.items():
        assert torch.equal(dense.get_submodule(name).weight, value)
    with torch.inference_mode():
        expected, plain = dense(ids).logits, models.plain()(ids).logits
    for row in (0, 3):
        limit = 1e-4 * float(expected[row].abs().max())
        assert (mixed[row] - expected[row]).abs().max() < limit
    assert torch.equal(mixed[1], plain[1])


def test_a_mixed_batch_equals_merged_models(models: zoo_models.Models, tmp_path: Path) -> None:
    expected = {"base": models.plain(), "sign1": models.plain("sign1")}
    for seed, name in enumerate(("one", "two")):
        lora, steps = adapter(tmp_path / name, 10 * seed)
        import_lora(models.base, lora, models.zoo / name)
        expected[name] = dense(models, steps)
    model = models.plain()
    deltas = Deltas(model, Checkpoint.open(models.base), models.zoo)
    names = ["one", "base", "two", "sign1", "one"]
    rows = [Row(deltas.acquire(name)) for name in names]
    ids = torch.randint(0, 128, (len(names), 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), deltas.batch(rows):
        mixed = model(ids).logits
    for i, name in enumerate(names):
        with torch.inference_mode():
            alone = expected[name](ids[i : i + 1]).logits[0]
        torch.testing.assert_close(mixed[i], alone, rtol=0, atol=2e-4)
    assert (mixed[0] - mixed[1]).abs().max() > 0.1
    deltas.close()


def test_a_dora_agrees_with_its_formula_in_float32(
    models: zoo_models.Models, tmp_path: Path
) -> None:
    names = [f"{LAYER}.mlp.up_proj", f"{LAYER}.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    model, tensors = models.plain(), {}
    for seed, name in enumerate(names):
        parameter = model.get_parameter(f"{name}.weight")
        out, into = parameter.shape
        own = factors(name, out, into, seed=seed)
        step = 2 * own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"]
        noise = torch.rand(out, generator=torch.Generator().manual_seed(seed)) * 0.04 + 0.98
        with torch.no_grad():
            merged = parameter + step
            own[f"{name}.lora_magnitude_vector"] = merged.norm(dim=1) * noise
            scale = own[f"{name}.lora_magnitude_vector"] / merged.norm(dim=1)
            parameter.copy_(scale.unsqueeze(1) * merged)
        tensors |= own
    write_adapter(tmp_path / "dora", tensors, use_dora=True)
    import_lora(models.base, tmp_path / "dora", models.zoo / "dora")
    entry = DeltaRepo.open(models.zoo / "dora").entry(f"{names[0]}.weight")
    assert [term["id"] for term in entry.terms] == ["lowrank", "codes", "codes"]
    served = models.plain()
    deltas = Deltas(served, Checkpoint.open(models.base), models.zoo)
    ids = torch.arange(30).reshape(3, 10)
    with torch.inference_mode():
        plain, expected = served(ids).logits, model(ids).logits
        with deltas.batch([Row(deltas.acquire(n)) for n in ("dora", "base", "dora")]):
            mixed = served(ids).logits
    assert torch.equal(mixed[1], plain[1])
    assert (mixed[[0, 2]] - expected[[0, 2]]).abs().max() < 3e-5
    assert (plain - expected).abs().max() > 0.1


def zoo_of(models: zoo_models.Models, importer: Callable[[Path], Path] | None) -> Zoo:
    base = Checkpoint.open(models.base)
    return Zoo(models.zoo, digest_source(base), "base", {"base"}, importer)


def test_a_zoo_holds_lora_folders(models: zoo_models.Models, deltafold_home: Path) -> None:
    lora, _ = adapter(models.zoo / "raw", 0)
    importer = partial(cached_lora, Checkpoint.open(models.base))
    assert [e.name for e in zoo_of(models, None).entries()] == ["sign1"]
    zoo = zoo_of(models, importer)
    assert [e.name for e in zoo.entries()] == ["raw", "sign1"]
    entry = zoo.find("raw")
    repo = entry.opened()
    assert repo.folder.name == "raw"
    assert deltafold_home in repo.folder.parents
    assert {p.name for p in lora.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md")
    }
    assert zoo.find("raw") is entry
    adapter(models.zoo / "raw", 5)
    assert zoo.find("raw").opened().digest != repo.digest


def test_a_lora_is_imported_once_and_holds_up_nobody(models: zoo_models.Models) -> None:
    adapter(models.zoo / "raw", 0)
    started, go = threading.Event(), threading.Event()
    imported: list[Path] = []

    def importer(folder: Path) -> Path:
        imported.append(folder)
        started.set()
        assert go.wait(30)
        return cached_lora(Checkpoint.open(models.base), folder)

    go.set()
    zoo = zoo_of(models, importer)
    adapter(models.zoo / "raw", 5)
    imported.clear()
    started.clear()
    go.clear()
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(zoo.find, "raw"), pool.submit(zoo.find, "raw")]
        listing = pool.submit(zoo.rescan)
        assert started.wait(30)
        # The import is under way; what is known is answered all the same.
        assert zoo.find("sign1").error is None
        assert "sign1" in [e.name for e in zoo.entries()]
        assert not any(f.done() for f in (*slow, listing))
        go.set()
        first, second = (f.result(30) for f in slow)
        listing.result(30)
    assert first is second
    assert len(imported) == 1
    shutil.rmtree(models.zoo / "raw")
    zoo.rescan()
    assert [e.name for e in zoo.entries()] == ["sign1"]
    with pytest.raises(DeltafoldError):
        zoo.find("../zoo/sign1")


def test_a_lora_that_does_not_fit_is_an_error_of_its_own(models: zoo_models.Models) -> None:
    write_adapter(models.zoo / "raw", factors("model.nowhere", 4, 4))
    zoo = zoo_of(models, partial(cached_lora, Checkpoint.open(models.base)))
    with pytest.raises(DeltafoldError) as caught:
        zoo.find("raw").opened()
    assert caught.value.code == "unexpected-tensor"
    assert zoo.find("sign1").error is None


def test_a_lora_folder_in_the_zoo_is_served_beside_deltas(models: zoo_models.Models) -> None:
    _, steps = adapter(models.zoo / "lora", seed=3)
    model = models.plain()
    deltas = Deltas(model, Checkpoint.open(models.base), models.zoo)
    assert [v.name for v in deltas.variants()] == ["base", "lora", "sign1"]
    rows = [Row(deltas.acquire("lora")), Row(deltas.acquire("sign1")), Row(None)]
    ids = torch.arange(15).reshape(3, 5)
    with torch.inference_mode(), deltas.batch(rows):
        mixed = model(ids).logits.log_softmax(-1)
    with torch.inference_mode():
        expected = dense(models, steps)(ids).logits.log_softmax(-1)[0]
    assert (mixed[0] - expected).abs().max() < 1e-4
