"""`lossless`: the fine-tune's own bits, compressed against the base's.

Differences of whole numbers, after FM-Delta, or the XOR of both in byte planes through zstandard, after
BitX (arXiv 2505.06252): the terms say how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.fast import Pair
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Context, Encoded, Lossless, LosslessStreams, Term


@method
@dataclass(frozen=True)
class LosslessMethod:
    """The smaller form is the default; zstandard streams are the quicker one.

    Attributes:
        level: 0 codes differences close to their entropy; 1 to 22 is the zstandard level of XOR
            streams (after BitX, arXiv 2505.06252).
    """

    id: ClassVar[str] = "lossless"
    summary: ClassVar[str] = "bit-exact: differences coded by the base's exponents; level=3: zstd"
    paper: ClassVar[str] = "after FM-Delta"
    needs: ClassVar[tuple[Need, ...]] = ()
    blockwise: ClassVar[bool] = True
    applied: ClassVar[str] = "rebuilt at load"

    level: int = 0

    def __post_init__(self) -> None:
        self._term("BF16")

    @property
    def entry_bytes(self) -> int:
        """Streams hold more at a time than coded differences."""
        return 24 if self.level else 0

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `lossless` term."""
        return [self._term("BF16").encode(delta, context)]

    def encode_pair(self, pair: Pair, context: Context) -> list[Encoded]:
        """The same."""
        return [self._term("BF16").encode(pair.variant, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `lossless` term; its size is known only when it is made."""
        return [self._term(dtype)]

    def _term(self, dtype: str) -> Lossless | LosslessStreams:
        if self.level:
            return LosslessStreams(dtype=dtype, level=self.level)
        return Lossless(dtype=dtype)
