"""`exact`: the fine-tune's own values as they are, for what is small, or must not be touched at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.fast import Pair
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Context, Encoded, Exact, Term


@method
@dataclass(frozen=True)
class ExactMethod:
    """Values as they are; the default for 1-D tensors."""

    id: ClassVar[str] = "exact"
    summary: ClassVar[str] = "the fine-tune's values as they are"
    paper: ClassVar[str] = "-"
    needs: ClassVar[tuple[Need, ...]] = ()
    blockwise: ClassVar[bool] = True
    applied: ClassVar[str] = "rebuilt at load"

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `exact` term."""
        return [Exact().encode(delta, context)]

    def encode_pair(self, pair: Pair, context: Context) -> list[Encoded]:
        """The same."""
        return [Exact().encode(pair.variant, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `exact` term."""
        return [Exact(dtype=dtype)]
