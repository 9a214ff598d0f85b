"""`bitdelta`: signs and scales, one bit a weight; with `bits` > 1, residual planes.

Source: Liu et al. (arXiv 2402.10193), sections 3.1 and 3.3, with the scales that need no data (the
paper's "initial" scales). Distilling the scales needs logits and is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Context, Encoded, Planes, Term


@method
@dataclass(frozen=True)
class BitDelta:
    """Sign planes.

    Attributes:
        bits: planes, 1 to 8.
        scale: what a scale covers; "tensor" is the paper's.
        group: columns of a group; giving it means scale=group.
    """

    id: ClassVar[str] = "bitdelta"
    summary: ClassVar[str] = "residual sign planes; bits=1,scale=tensor is the paper's"
    paper: ClassVar[str] = "2402.10193"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sign planes on the fly"

    bits: int = 1
    scale: Literal["tensor", "row", "group"] = "row"
    group: int = 0

    def __post_init__(self) -> None:
        self._term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `planes` term."""
        return [self._term().encode(delta, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `planes` term."""
        return [self._term()]

    def _term(self) -> Planes:
        scale: Literal["tensor", "row", "group"] = "group" if self.group else self.scale
        # A scale a tensor or row is too few bytes to save on; groups are where half pays.
        return Planes(
            bits=self.bits,
            scale=scale,
            group=self.group,
            scale_format="float16" if scale == "group" else "float32",
        )
