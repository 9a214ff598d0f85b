"""`int`: plain round-to-nearest codes of 2 to 8 bits with a scale a row or group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.fast import Pair
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Codes, Context, Encoded, Term


@method
@dataclass(frozen=True)
class Integer:
    """Uniform codes.

    Attributes:
        bits: 2 to 8.
        group: columns that share a scale; 0 is the whole row.
    """

    id: ClassVar[str] = "int"
    summary: ClassVar[str] = "uniform codes of 2 to 8 bits, a scale a row or group"
    paper: ClassVar[str] = "-"
    needs: ClassVar[tuple[Need, ...]] = ()
    blockwise: ClassVar[bool] = True
    applied: ClassVar[str] = "codes on the fly"

    bits: int = 4
    group: int = 0

    def __post_init__(self) -> None:
        self._term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `codes` term."""
        return [self._term().encode(delta, context)]

    def encode_pair(self, pair: Pair, context: Context) -> list[Encoded]:
        """The same for the difference of two matrices."""
        return [self._term().encode_pair(pair)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `codes` term."""
        return [self._term()]

    def _term(self) -> Codes:
        return Codes(bits=self.bits, group=self.group)
