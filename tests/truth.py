"""What a model of transformers says by itself, and fine-tunes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def moved(model: Any, keep: Callable[[str], bool] = lambda name: False, seed: int = 1) -> Any:
    """A model with every parameter moved a little, but for those that are kept."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not keep(name):
                value += torch.randn(value.shape, generator=noise) * 0.05
    return model


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """What transformers generates for one prompt alone."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
