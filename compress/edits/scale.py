"""`scale`: multiply the delta; below 1 interpolates towards the base, above extrapolates.

Source: Zheng et al., EXPO (arXiv 2404.16792), section 2: `theta_2 = theta_1 + alpha (theta_1 -
theta_0)`, that is `by = 1 + alpha`. Serving can do the same for one request (`scale`), since every
term is linear in it; the edit is for deltas that shall always be served so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.terms import Context


@edit
@dataclass(frozen=True)
class Scale:
    """Every entry times a factor.

    Attributes:
        by: the factor; 1 leaves the delta as it is.
    """

    id: ClassVar[str] = "scale"
    summary: ClassVar[str] = "multiply the delta: extrapolate above 1, interpolate below"
    paper: ClassVar[str] = "2404.16792"
    needs: ClassVar[tuple[Need, ...]] = ()
    blockwise: ClassVar[bool] = True

    by: float = 1.5

    def __post_init__(self) -> None:
        if not math.isfinite(self.by):
            raise DeltafoldError("bad-recipe", f"scale: by must be a number, not {self.by}")

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """`by * delta`."""
        return delta * self.by
