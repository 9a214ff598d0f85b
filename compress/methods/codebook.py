"""`codebook`: a sign and one of a few magnitudes for each weight.

Source: arXiv 2410.13841, section 4.2 (more bits for BitDelta): sorted magnitudes in blocks, each
block its mean; one bit is BitDelta. Whether the blocks hold equal counts, and over what they are
taken, the paper leaves open; here they do, over a tensor or a row. Levels of least squared error are
not in the paper: they are `lloyd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Codebook, Context, Encoded, Term


@method
@dataclass(frozen=True)
class CodebookMethod:
    """Blocks of equal counts.

    Attributes:
        bits: sign included, 1 to 8; `2**(bits-1)` magnitudes.
        scale: what has a table of its own.
    """

    id: ClassVar[str] = "codebook"
    summary: ClassVar[str] = "sign and magnitude block, blocks of equal counts; 1 bit is BitDelta"
    paper: ClassVar[str] = "2410.13841"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sign planes up to 3 bits, else rebuilt"
    on_device: ClassVar[bool] = True

    bits: int = 3
    scale: Literal["tensor", "row"] = "tensor"

    def __post_init__(self) -> None:
        self.term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `codebook` term."""
        return [self.term().encode(delta, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `codebook` term."""
        return [self.term()]

    def term(self) -> Codebook:
        """As configured. Raises `bad-recipe`."""
        if not 1 <= self.bits <= 8:
            raise DeltafoldError("bad-recipe", f"{self.id}: bits must be 1 to 8, not {self.bits}")
        # A table a tensor is too few bytes to save on.
        table = "float32" if self.scale == "tensor" else "float16"
        return Codebook(2 ** (self.bits - 1), self.scale, table)
