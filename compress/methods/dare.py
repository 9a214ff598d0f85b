"""`dare`: drop delta entries at random and rescale the rest.

Source: Yu et al., "Language Models are Super Mario" (arXiv 2311.03099), section 3.2: keep each entry
with probability 1-p and divide what is kept by 1-p, so that the expected delta is unchanged. The mask
is regenerated from its seed, so that only values are stored: 16 (1-p) bits a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Context, Encoded, Sparse, Term


@method
@dataclass(frozen=True)
class Dare:
    """Random drop and rescale.

    Attributes:
        drop: the paper's p, in [0, 1).
        seed: of the mask; masks of different tensors differ under one seed.
        rescale: divide kept entries by 1-p; without it the expected delta shrinks.
    """

    id: ClassVar[str] = "dare"
    summary: ClassVar[str] = "random drop and rescale, mask regenerated from a seed"
    paper: ClassVar[str] = "2311.03099"
    needs: ClassVar[tuple[Need, ...]] = ()
    blockwise: ClassVar[bool] = True
    applied: ClassVar[str] = "sparse on the fly"

    drop: float = 0.9
    seed: int = 0
    rescale: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise DeltafoldError("bad-recipe", f"dare: drop must be in [0, 1), not {self.drop}")
        self._term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `sparse` term with a seeded mask."""
        if self.rescale:
            delta = delta / (1 - self.drop)
        return [self._term().encode(delta, context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `sparse` term, its count as the drop rate promises."""
        return [self._term()]

    def _term(self) -> Sparse:
        return Sparse(mask="seed", drop=self.drop, seed=self.seed)
