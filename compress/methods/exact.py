"""`exact` and `lossless`: the fine-tune's own bits, plain or compressed against the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Context, Encoded, Exact, Lossless, Term


@method
@dataclass(frozen=True)
class ExactMethod:
    """Values as they are; the default for 1-D tensors."""

    id: ClassVar[str] = "exact"
    summary: ClassVar[str] = "the fine-tune's values as they are"
    paper: ClassVar[str] = "-"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "rebuilt at load"

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `exact` term."""
        return [Exact().encode(delta, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `exact` term."""
        return [Exact(dtype=dtype)]


@method
@dataclass(frozen=True)
class LosslessMethod:
    """XOR streams and zstandard.

    Attributes:
        level: zstandard level, 1 to 22.
    """

    id: ClassVar[str] = "lossless"
    summary: ClassVar[str] = "bit-exact: XOR with the base, byte streams, zstandard"
    paper: ClassVar[str] = "2505.06252"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "rebuilt at load"

    level: int = 3

    def __post_init__(self) -> None:
        Lossless(level=self.level)

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `lossless` term."""
        return [Lossless(level=self.level).encode(delta, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `lossless` term; its size is known only when it is made."""
        return [Lossless(dtype=dtype, level=self.level)]
