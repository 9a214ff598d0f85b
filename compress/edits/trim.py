"""`trim`: keep the entries of largest magnitude, drop the others, rescale nothing.

Source: Yadav et al., TIES-Merging (arXiv 2306.01708), section 4, its first step: the top k per cent of
the whole flattened model, not of each tensor. By itself it is one of the edits that arXiv 2410.13841
studies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.terms import Context
from deltafold.compress.threshold import magnitude_thresholds, tensor_threshold


@edit
@dataclass(frozen=True)
class Trim:
    """Keep a share of the entries by magnitude.

    Entries as large as the least one that is kept are kept too.

    Attributes:
        keep: share of the entries; 0.2 is the paper's.
        scope: what the share is of: all tensors of the `model` that are edited, or each `tensor`.
        threshold: least magnitude that is kept; 0 finds it by `keep`.
    """

    id: ClassVar[str] = "trim"
    summary: ClassVar[str] = (
        "keep the entries of largest magnitude, of the whole model or each tensor"
    )
    paper: ClassVar[str] = "2306.01708"
    needs: ClassVar[tuple[Need, ...]] = ()

    keep: float = 0.2
    scope: Literal["model", "tensor"] = "model"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise DeltafoldError("bad-recipe", f"trim: keep must be in (0, 1], not {self.keep}")
        if not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise DeltafoldError(
                "bad-recipe", f"trim: threshold must be 0 or more, not {self.threshold}"
            )

    def survey(self, deltas: Iterable[tuple[str, torch.Tensor]]) -> Self:
        """The trim with the whole model's threshold."""
        if self.scope == "tensor" or self.threshold:
            return self
        (found,) = magnitude_thresholds(lambda: ((d,) for _, d in deltas), 1, self.keep)
        # Where less than `keep` differs at all, nothing is to be dropped, and every entry is above.
        return replace(self, threshold=found or math.ulp(0.0))

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """Zero below the threshold, unchanged above."""
        threshold = self.threshold
        if not threshold:
            assert self.scope == "tensor", "the whole model was not surveyed"
            threshold = tensor_threshold(delta, self.keep)
        return torch.where(delta.abs() >= threshold, delta, 0.0)
