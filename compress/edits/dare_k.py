"""`dare-k`: multiply a share p of the entries by k, the others so that the mean stays the same.

Source: "A Unified View of Delta Parameter Editing in Post-Trained Large-Scale Models" (arXiv
2410.13841), section 3: with `M ~ Bernoulli(p)` the edit is `k M D + (1-kp)/(1-p) (1-M) D`, whose
expected multiplier is 1 and whose variance is `(1-k)^2 p / (1-p)`. k = 0 is DARE, k = 1 changes
nothing.

Its table 1 also splits by the sign of the delta: negative entries times k, the others times
`(1-kp)/(1-p)`. Which p was used there is not stated; here the share of negative entries is measured,
unless p or both multipliers are given. Nothing becomes zero, so this saves no bytes: it is for study.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.edits.dare import check_seed
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.philox import keep_mask
from deltafold.compress.terms import Context


@edit
@dataclass(frozen=True)
class DareK:
    """Two multipliers for two shares of the entries.

    Attributes:
        k: multiplier of the selected entries.
        p: share that is selected; None takes 0.5 for a random mask, and what is measured in each
            tensor for `sign`.
        mask: `random`, or `sign`: the negative entries are selected.
        other: multiplier of the other entries; None takes `(1-kp)/(1-p)`.
        seed: of the random mask.
    """

    id: ClassVar[str] = "dare-k"
    summary: ClassVar[str] = (
        "multiply a share of the entries by k, the others so that the mean stays"
    )
    paper: ClassVar[str] = "2410.13841"
    needs: ClassVar[tuple[Need, ...]] = ()

    k: float = 0.0
    p: float | None = None
    mask: Literal["random", "sign"] = "random"
    other: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_multipliers("dare-k", self.k, self.p, self.other)
        check_seed("dare-k", self.seed)

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """`k D` where selected, `other D` elsewhere."""
        if self.mask == "sign":
            return split(delta, delta < 0, self.k, self.p, self.other)
        p = 0.5 if self.p is None else self.p
        # What a drop of p would keep is what is not selected: k = 0 is DARE to the last bit.
        kept = keep_mask(delta.numel(), drop=p, seed=self.seed, name=context.name)
        selected = ~torch.from_numpy(kept).reshape(delta.shape)
        return split(delta, selected, self.k, p, self.other)


def split(
    delta: torch.Tensor,
    selected: torch.Tensor,
    k: float,
    p: float | None,
    other: float | None,
) -> torch.Tensor:
    """`k D` where selected, elsewhere `other D`, or `(1-kp)/(1-p) D` with p measured if None."""
    if other is None:
        if p is None:
            p = selected.to(torch.float64).mean().item() if selected.numel() else 0.0
        # Where all entries are selected there are no others to make up for them.
        other = (1 - k * p) / (1 - p) if p < 1 else 1.0
    return torch.where(selected, delta * k, delta * other)


def check_multipliers(who: str, k: float, p: float | None, other: float | None) -> None:
    """Raises `bad-recipe` unless the multipliers are numbers and p is in [0, 1)."""
    if not math.isfinite(k) or not (other is None or math.isfinite(other)):
        raise DeltafoldError("bad-recipe", f"{who}: k and other must be numbers")
    if p is not None and not 0 <= p < 1:
        raise DeltafoldError("bad-recipe", f"{who}: p must be in [0, 1), not {p}")
