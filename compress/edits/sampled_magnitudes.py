"""`sampled-magnitudes`: keep the signs, draw the magnitudes.

Source: "A Unified View of Delta Parameter Editing in Post-Trained Large-Scale Models" (arXiv
2410.13841), section 4.2, an extension of BitDelta that is there for study: in place of the mean
magnitude each entry gets a draw from a normal or an even distribution with that mean. The spread of
the draws is not stated there, hence `spread`; 0 is BitDelta's constant. A normal draw may be negative,
which turns the entry's sign.

It is an edit and no codec: stored as signs, a mean and a seed it would take what `bitdelta` takes, and
err more.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Final, Literal

import numpy as np
import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.edits.dare import check_seed
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.philox import words_of
from deltafold.compress.terms import Context

#: Draws are the middles of so many equally likely parts of a distribution: a table of them, and no
#: logarithm for each, so that all machines draw the same.
_PARTS: Final = 4096


@edit
@dataclass(frozen=True)
class SampledMagnitudes:
    """Random magnitudes around the tensor's mean.

    Attributes:
        draw: from a `normal` or an even (`uniform`) distribution.
        spread: standard deviation of the draws over their mean.
        seed: of the draws; those of different tensors differ under one seed.
    """

    id: ClassVar[str] = "sampled-magnitudes"
    summary: ClassVar[str] = "keep the signs, draw magnitudes around the tensor's mean"
    paper: ClassVar[str] = "2410.13841"
    needs: ClassVar[tuple[Need, ...]] = ()

    draw: Literal["normal", "uniform"] = "normal"
    spread: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.spread) and self.spread >= 0):
            raise DeltafoldError(
                "bad-recipe", f"sampled-magnitudes: spread must be 0 or more, not {self.spread}"
            )
        check_seed("sampled-magnitudes", self.seed)

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """`sign(D) m` with m drawn; entries that are zero stay so and are not counted in the mean."""
        changed = int((delta != 0).sum())
        mean = delta.abs().sum(dtype=torch.float64) / max(changed, 1)
        words = words_of(delta.numel(), seed=self.seed, name=context.name)
        places = torch.from_numpy((words // (2**32 // _PARTS)).astype(np.int64))
        table = torch.tensor(middles(self.draw), dtype=torch.float64)
        levels = (mean * (1 + self.spread * table)).to(torch.float32)
        return delta.sign() * levels[places].reshape(delta.shape)


@functools.lru_cache
def middles(draw: str) -> tuple[float, ...]:
    """The middles of equally likely parts of a distribution of mean 0 and standard deviation 1."""
    shares = [(i + 0.5) / _PARTS for i in range(_PARTS)]
    if draw == "uniform":
        return tuple((2 * share - 1) * math.sqrt(3) for share in shares)
    return tuple(map(NormalDist().inv_cdf, shares))
