"""Tiny models with an encoder and a tokenizer, and their fine-tunes in a zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arch_sequences
import pico
import torch
import transformers

from deltafold.compress import Recipe, compress_checkpoint, parse_spec, restore_checkpoint

T5 = transformers.T5ForConditionalGeneration


def pack(folder: Path, name: str, model: Any, codec: str, **options: Any) -> None:
    """Move every parameter of a model, pack it into the zoo, and restore it in float32."""
    noise = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn(value.shape, generator=noise) * 0.1
    model.save_pretrained(folder / f"{name}-full")
    for path in (folder / "base").glob("*token*"):
        (folder / f"{name}-full" / path.name).write_bytes(path.read_bytes())
    delta, recipe = folder / "zoo" / name, Recipe(default=parse_spec(codec))
    compress_checkpoint(folder / "base", folder / f"{name}-full", delta, recipe=recipe, **options)
    restore_checkpoint(delta, folder / "base", folder / name, dtype=torch.float32)


def plain(folder: Path, kind: Any = T5) -> Any:
    """A float32 model as transformers loads it."""
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def t5(folder: Path) -> Path:
    """A T5 with a tokenizer, and three fine-tunes; one has more words."""
    sizes = {**arch_sequences._T5, "vocab_size": pico.VOCABULARY, "eos_token_id": None}
    torch.manual_seed(0)
    T5(transformers.T5Config(**sizes, initializer_factor=3.0)).save_pretrained(folder / "base")
    pico.tokenizer(folder / "base", vocabulary=pico.VOCABULARY)
    pack(folder, "sign", plain(folder / "base"), "bitdelta:bits=2,group=16")
    pack(folder, "exact", plain(folder / "base"), "lossless")
    more = plain(folder / "base")
    more.resize_token_embeddings(pico.VOCABULARY + 8, mean_resizing=False)
    pack(folder, "more", more, "lossless", accept=["resized"])
    return folder
