"""Ways in which deltas go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import zoo_models
from safetensors.torch import load_file, save_file

from deltafold.compress import Recipe, compress_checkpoint, parse_spec


def resized(folder: Path, delta: Path) -> Path:
    """A delta of a fine-tune with four tokens more."""
    full = zoo_models.fine_tune(folder, "resized")
    tensors = load_file(full / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(4, tensors[name].shape[1])])
    save_file(tensors, full / "model.safetensors", {"format": "pt"})
    config = json.loads((full / "config.json").read_text("utf-8"))
    config["vocab_size"] += 4
    (full / "config.json").write_text(json.dumps(config))
    recipe = Recipe(default=parse_spec("int:bits=4"))
    compress_checkpoint(folder / "base", full, delta, recipe=recipe, accept=["resized"])
    return delta


def overwrite(place: Path, change: Callable[[bytearray], bytearray]) -> None:
    """Change a payload's bytes where they lie, as `cp` onto a file does."""
    payload = place / "delta.safetensors"
    raw = change(bytearray(payload.read_bytes()))
    with payload.open("r+b") as file:
        file.write(raw)
        file.truncate(len(raw))
