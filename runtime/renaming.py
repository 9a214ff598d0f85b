"""The names that a loader gives to a checkpoint's tensors, as transformers says itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def renaming(model: nn.Module) -> Callable[[str], str]:
    """A function from a checkpoint's names to the model's.

    Tensors that the loader fuses or splits keep their names, as do all where transformers is too old
    to tell: these are found by their bytes.
    """
    transforms: list[Any] = []
    # A model of transformers has brought transformers; no other model needs it.
    if "transformers" in sys.modules:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming, rename_source_key

            transforms = get_model_conversion_mapping(model)
        except (ImportError, AttributeError, TypeError):
            transforms = []
    if not transforms:
        return lambda name: name
    plain = [t for t in transforms if isinstance(t, WeightRenaming)]
    fusing = [t for t in transforms if not isinstance(t, WeightRenaming)]

    def rename(name: str) -> str:
        new, fused = rename_source_key(name, plain, fusing)
        return name if fused is not None else str(new)

    return rename
