"""Bases and fine-tunes in bfloat16, float16, float32 and mixtures of them, in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arch_table
import pytest
import torch
import transformers
from truth import moved

from deltafold.compress import (
    Checkpoint,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
)
from deltafold.compress.fingerprint import digest_source
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.host import Row

KINDS = ("bfloat16", "float16", "float32", "mixed")


def cast(model: Any, kind: str) -> Any:
    """A model in one dtype; or matrices in bfloat16, and norms, biases, sinks in float32."""
    for value in model.parameters():
        small = torch.float32 if value.dim() < 2 else torch.bfloat16
        value.data = value.data.to(small if kind == "mixed" else getattr(torch, kind))
    return model


def plain(folder: Path) -> Any:
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("base", KINDS)
def test_every_pair_of_dtypes(base: str, tmp_path: Path) -> None:
    """Tied tables, biases, experts and sinks among what has a dtype."""
    family = next(f for f in arch_table.FAMILIES if f.name == "GptOss")
    cast(family.build(), base).save_pretrained(tmp_path / "base")
    names = []
    for kind in KINDS:
        full = tmp_path / "full" / kind
        cast(moved(plain(tmp_path / "base")), kind).save_pretrained(full)
        lossy = ["bitdelta:bits=2,group=16"] if kind in ("float16", "mixed") else []
        for codec in ("lossless", *lossy):
            name = f"{kind}-{codec.partition(':')[0]}"
            delta, recipe = tmp_path / "zoo" / name, Recipe(default=parse_spec(codec))
            compress_checkpoint(tmp_path / "base", full, delta, recipe=recipe)
            restore_checkpoint(delta, tmp_path / "base", tmp_path / name, dtype=torch.float32)
            names.append(name)
        same = tmp_path / f"{kind}-same"
        restore_checkpoint(tmp_path / "zoo" / f"{kind}-lossless", tmp_path / "base", same)
        assert digest_source(Checkpoint.open(same)) == digest_source(Checkpoint.open(full))
    model = plain(tmp_path / "base")
    deltas = Deltas(model, Checkpoint.open(tmp_path / "base"), tmp_path / "zoo")
    rows = [Row(deltas.acquire(name)) for name in (*names, "base")]
    ids = torch.arange(7 * len(rows)).reshape(len(rows), 7) % arch_table.VOCABULARY
    with torch.inference_mode(), deltas.batch(rows):
        mixed = model(ids).logits.log_softmax(-1)
    for row, name in enumerate((*names, "base")):
        with torch.inference_mode():
            dense = plain(tmp_path / name)(ids[row : row + 1]).logits[0].log_softmax(-1)
        assert (mixed[row] - dense).abs().max() < 1e-4, name
