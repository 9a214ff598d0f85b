"""`codebook` and `lloyd`: a sign and one of a few magnitudes for each weight.

Source: arXiv 2410.13841, section 4.2 (more bits for BitDelta): sorted magnitudes in blocks, each
block its mean; one bit is BitDelta. Whether the blocks hold equal counts, and over what they are
taken, the paper leaves open; here they do, over a tensor or a row. Lloyd's levels have less squared
error at the same size and are not in the paper, hence the other name.
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
        _term(self.id, self.bits, self.scale)

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `codebook` term."""
        return [_term(self.id, self.bits, self.scale).encode(delta, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `codebook` term."""
        return [_term(self.id, self.bits, self.scale)]


@method
@dataclass(frozen=True)
class Lloyd(CodebookMethod):
    """Levels of least squared error, with the same options."""

    id: ClassVar[str] = "lloyd"
    summary: ClassVar[str] = "sign and magnitude level, levels of least squared error"
    paper: ClassVar[str] = "Lloyd 1982"
    #: Its running sums have no fixed order on a GPU.
    on_device: ClassVar[bool] = False

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `codebook` term."""
        return [_term(self.id, self.bits, self.scale).encode_lloyd(delta)]


def _term(who: str, bits: int, scale: Literal["tensor", "row"]) -> Codebook:
    if not 1 <= bits <= 8:
        raise DeltafoldError("bad-recipe", f"{who}: bits must be 1 to 8, not {bits}")
    # A table a tensor is too few bytes to save on.
    return Codebook(2 ** (bits - 1), scale, "float32" if scale == "tensor" else "float16")
