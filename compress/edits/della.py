"""`della`: drop small entries more often than large ones, each divided by its own keep probability.

Source: Deep et al., DELLA-Merging (arXiv 2406.11617), its MagPrune step, and the authors' released code
for the exact ramp: of M entries of a row, ranked by magnitude from r = 1, the keep probability is

    1 - drop - window / 2 + (r - 1) / (M - 1) * window

so that the expected delta stays the same entry by entry. The mask depends on the data, so no seed
regenerates it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.edits.dare import check_seed
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.philox import words_of
from deltafold.compress.terms import Context, rows_and_columns


@edit
@dataclass(frozen=True)
class Della:
    """Drop by magnitude, at random.

    Attributes:
        drop: mean share that is dropped.
        window: difference of the keep probabilities of the largest and the smallest entry.
        over: what entries are compared with: those of their `row`, or of the whole `tensor`.
        by: whether the probability grows with the `rank`, or with the `magnitude` itself.
        seed: of the random choice.
        rescale: divide what is kept by its keep probability.
    """

    id: ClassVar[str] = "della"
    summary: ClassVar[str] = (
        "drop small entries more often than large ones, rescale each by its odds"
    )
    paper: ClassVar[str] = "2406.11617"
    needs: ClassVar[tuple[Need, ...]] = ()

    drop: float = 0.3
    window: float = 0.14
    over: Literal["row", "tensor"] = "row"
    by: Literal["rank", "magnitude"] = "rank"
    seed: int = 0
    rescale: bool = True

    def __post_init__(self) -> None:
        keep, half = 1 - self.drop, self.window / 2
        # At the largest entry the sum may be 1 but for rounding; nothing may be kept never.
        if not (half >= 0 and keep - half > 0 and keep + half <= 1 + 1e-9):
            raise DeltafoldError(
                "bad-recipe", "della: 1-drop plus and minus window/2 must stay between 0 and 1"
            )
        check_seed("della", self.seed)

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """`m D / q`, with m true with probability q."""
        if not delta.numel():
            return delta.clone()
        matrix = delta.reshape(rows_and_columns(tuple(delta.shape)))
        odds = self.probabilities(matrix)
        drawn = torch.from_numpy(words_of(delta.numel(), seed=self.seed, name=context.name))
        # In float64, where all 2^32 words and the bounds between them are exact.
        keep = drawn.to(torch.float64).reshape(matrix.shape) < odds.to(torch.float64) * 2**32
        kept = torch.where(keep, matrix / odds if self.rescale else matrix, 0.0)
        return kept.reshape(delta.shape)

    def probabilities(self, matrix: torch.Tensor) -> torch.Tensor:
        """Keep probabilities of a float32 `[N, M]`, float32 of the same shape."""
        flat = matrix.abs() if self.over == "row" else matrix.abs().reshape(1, -1)
        place = _ranks(flat) if self.by == "rank" else _heights(flat)
        odds = (1 - self.drop - self.window / 2) + place * self.window
        return odds.clamp_max(1.0).reshape(matrix.shape)


def _ranks(magnitudes: torch.Tensor) -> torch.Tensor:
    """The place of each entry in its row, 0 for the smallest to 1; 1/2 where there is but one."""
    columns = magnitudes.shape[1]
    if columns == 1:
        return torch.full_like(magnitudes, 0.5)
    order = magnitudes.argsort(dim=1, stable=True)
    ramp = torch.arange(columns, dtype=torch.float32).div(columns - 1).expand_as(order)
    return torch.zeros_like(magnitudes).scatter_(1, order, ramp)


def _heights(magnitudes: torch.Tensor) -> torch.Tensor:
    """Each magnitude between its row's least (0) and largest (1); 1/2 where all are the same."""
    least, most = magnitudes.aminmax(dim=1, keepdim=True)
    width = most - least
    return torch.where(width > 0, (magnitudes - least) / width, 0.5)
