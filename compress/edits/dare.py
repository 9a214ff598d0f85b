"""`dare`: drop entries at random, divide the others by a constant.

Source: Yu et al., "Language Models are Super Mario" (arXiv 2311.03099), section 3.2: drop with
probability p, divide what is left by 1-p, so that the expected delta stays the same. As an edit it can
stand before any codec; the codec `dare` stores the same mask as its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.philox import keep_mask
from deltafold.compress.terms import Context


@edit
@dataclass(frozen=True)
class DareEdit:
    """Random drop and rescale.

    Attributes:
        drop: the paper's p, in [0, 1).
        seed: of the mask; masks of different tensors differ under one seed.
        divisor: of what is kept; 0 takes 1-p. DAREx-q (arXiv 2410.09344) takes more, up to 1: the
            expected delta shrinks, and its variance more so.
    """

    id: ClassVar[str] = "dare"
    summary: ClassVar[str] = "drop entries at random, rescale the others"
    paper: ClassVar[str] = "2311.03099"
    needs: ClassVar[tuple[Need, ...]] = ()

    drop: float = 0.9
    seed: int = 0
    divisor: float = 0.0

    def __post_init__(self) -> None:
        check_drop("dare", self.drop, self.seed)
        if not (self.divisor == 0 or 1 - self.drop <= self.divisor <= 1):
            raise DeltafoldError(
                "bad-recipe",
                f"dare: divisor must be between 1-drop and 1, or 0, not {self.divisor}",
            )

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """`(1-m) D / divisor`, with m true for a share `drop` of the entries."""
        return dropped(delta, self.drop, self.seed, context.name) / (self.divisor or 1 - self.drop)


def dropped(delta: torch.Tensor, drop: float, seed: int, name: str) -> torch.Tensor:
    """A delta with a random share `drop` of its entries set to zero; nothing is rescaled."""
    keep = torch.from_numpy(keep_mask(delta.numel(), drop=drop, seed=seed, name=name))
    return torch.where(keep.reshape(delta.shape), delta, 0.0)


def check_drop(who: str, drop: float, seed: int) -> None:
    """Raises `bad-recipe` unless `drop` is in [0, 1) and the seed fits the generator."""
    if not 0 <= drop < 1:
        raise DeltafoldError("bad-recipe", f"{who}: drop must be in [0, 1), not {drop}")
    check_seed(who, seed)


def check_seed(who: str, seed: int) -> None:
    """Raises `bad-recipe` unless the seed fits the generator's key of 64 bits."""
    if not 0 <= seed < 2**64:
        raise DeltafoldError("bad-recipe", f"{who}: seed must be in [0, 2^64), not {seed}")
