"""Variants of a family share batches with all else, and a shared tensor is in memory once."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
import torch
import zoo_models

from deltafold.compress import Checkpoint, DeltafoldError, restore_checkpoint
from deltafold.compress.families import parse_family
from deltafold.compress.families.pack import compress_family
from deltafold.compress.family import FOLDER, families_in
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.host import Row


def family(models: zoo_models.Models, method: str, names: list[str]) -> None:
    """Fine-tunes packed together, and restored as float32 models."""
    root = models.base.parent
    full = [zoo_models.fine_tune(root, name) for name in names]
    compress_family(models.base, full, models.zoo, method=parse_family(method))
    for name in names:
        out = models.dense / name
        restore_checkpoint(models.zoo / name, models.base, out, dtype=torch.float32)


@pytest.fixture
def models(tmp_path: Path) -> zoo_models.Models:
    made = zoo_models.make(tmp_path, "Qwen2", codecs={"sign1": "bitdelta"}, dtype=torch.float32)
    family(made, "emr", ["red", "green", "blue"])
    family(made, "row-groups:groups=2", ["one", "two", "three"])
    family(made, "shift-scale:rest=(bitdelta:bits=2)", ["ann", "bob"])
    gc.collect()  # models of earlier tests, and with them their shared tensors
    return made


def test_a_mixed_batch_equals_dense_models(models: zoo_models.Models) -> None:
    model = models.plain()
    deltas = Deltas(model, Checkpoint.open(models.base), models.zoo)
    names = ["red", "base", "two", "sign1", "green", "one", "ann", "red", "bob"]
    rows = [Row(deltas.acquire(name)) for name in names]
    ids = torch.randint(0, 128, (len(names), 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), deltas.batch(rows):
        mixed = model(ids).logits
    for i, name in enumerate(names):
        with torch.inference_mode():
            alone = models.plain(name)(ids[i : i + 1]).logits[0]
        torch.testing.assert_close(mixed[i], alone, rtol=0, atol=2e-4)
    assert (mixed[0] - mixed[4]).abs().max() > 0.01
    deltas.close()


def test_a_shared_tensor_is_in_memory_once(models: zoo_models.Models) -> None:
    deltas = Deltas(models.plain(), Checkpoint.open(models.base), models.zoo)
    first = deltas.acquire("red")
    alone = deltas.resident()
    second = deltas.acquire("green")
    both = deltas.resident()
    (shared,) = {alone[FOLDER], both[FOLDER]}
    weights = (
        sum(v.numel() * 4 for v in models.plain().state_dict().values() if v.dim() > 1)
        - models.plain().lm_head.weight.numel() * 4
    )  # tied
    assert shared == weights
    assert both["green"] == alone["red"] < shared / 16
    deltas.acquire("one")
    assert deltas.resident()[FOLDER] == 3 * shared
    for variant in (first, second):
        deltas.release(variant)
    deltas.close()


def test_tables_go_with_the_last_variant(models: zoo_models.Models) -> None:
    deltas = Deltas(models.plain(), Checkpoint.open(models.base), models.zoo, max_deltas=1)
    for name in ("red", "green", "sign1"):
        deltas.release(deltas.acquire(name))
    assert deltas.resident().keys() == {"sign1"}
    deltas.close()


def test_a_family_that_is_missing_and_comes_back(models: zoo_models.Models, tmp_path: Path) -> None:
    gone = {path: tmp_path / path.name for path in families_in(models.zoo)}
    for path, away in gone.items():
        shutil.move(path, away)
    base = Checkpoint.open(models.base)
    with pytest.raises(DeltafoldError, match="family is not there"):
        Deltas(models.plain(), base, models.zoo)
    deltas = Deltas(models.plain(), base, models.zoo, strict=False)
    assert [v.name for v in deltas.variants()] == ["base", "sign1"]
    for path, away in gone.items():
        shutil.move(away, path)
    deltas.release(deltas.acquire("red"))
    assert len(deltas.variants()) == 10
    deltas.close()
