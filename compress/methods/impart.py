"""`impart`: low rank with entries of the factors dropped, more of them where a singular value is small.

Source: Yang et al., ImPart (arXiv 2504.13237), section 3. Of n ranks the share `1 - beta` is kept.
With alpha the share of the factors' entries that must go, `gamma = (alpha - beta) / (1 - beta)`;
vector k drops `(1 - (sigma_k / sigma_1)^C) gamma` of its entries, and the last vectors all of
theirs until the mean is gamma; what is kept is divided by the share kept. The paper gives alpha and
beta for two shapes. Both are instances of one rule, with `g = 2 max(N, M) / (N + M)`: `1 - alpha =
g / (2 ratio)` and `1 - beta(N, M) = g (1 - beta)`. Masks come from a seed and cost no index, as in
the paper, but from the format's own generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Banded, Context, Encoded, Term, rows_and_columns
from deltafold.compress.terms.lowrank import truncated_svd


@method
@dataclass(frozen=True)
class ImPart:
    """Importance-aware dropout of singular vectors' entries.

    Attributes:
        ratio: of the 16-bit tensor's size to that of the kept values.
        beta: share of the ranks that are left out, for a square matrix; the paper tries 0.6 to 0.8.
        power: the paper's C; it tries 0.5 and 1.
        seed: of the masks.
    """

    id: ClassVar[str] = "impart"
    summary: ClassVar[str] = "low rank, entries of weak vectors dropped by seeded masks"
    paper: ClassVar[str] = "after 2504.13237"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "low rank on the fly"

    ratio: float = 16.0
    beta: float = 0.7
    power: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise DeltafoldError(
                "bad-recipe", f"impart: ratio must be at least 1, not {self.ratio}"
            )
        if not (0 <= self.beta < 1 and math.isfinite(self.power) and self.power >= 0):
            raise DeltafoldError("bad-recipe", "impart: beta must be in [0, 1), power not negative")
        self._term(1)

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `banded` term of float16 values."""
        rows, columns = rows_and_columns(tuple(delta.shape))
        rank, gamma = self.budget(rows, columns)
        left, singular, right = truncated_svd(delta.reshape(rows, columns), rank)
        drop = drop_rates(singular, gamma, self.power)
        alive = int((drop < 1).sum())
        drop = drop[:alive]
        lengths = torch.tensor([[columns], [rows]], dtype=torch.float64)
        kept = (lengths - torch.floor(lengths * drop)).to(torch.int32)
        # By the share that is really kept, a whole number of entries, so that the mean is right.
        rescale = (singular[:alive].sqrt() * lengths / kept).to(torch.float32).unsqueeze(2)
        a, b = rescale[0] * right[:alive], rescale[1] * left[:, :alive].T
        return [self._term(alive).from_factors(a, b, context, kept)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `banded` term, its counts as gamma promises."""
        rows, columns = rows_and_columns(shape)
        rank, gamma = self.budget(rows, columns)
        counts = tuple(round(rank * length * (1 - gamma)) for length in (columns, rows))
        return [self._term(rank, counts)]

    def budget(self, rows: int, columns: int) -> tuple[int, float]:
        """Ranks kept, and the share of their entries to drop (gamma)."""
        least, most = min(rows, columns), max(rows, columns)
        stretch = 2 * most / max(rows + columns, 1)
        left = min(stretch * (1 - self.beta), 1.0)
        rank = max(math.floor(least * left), 1)
        wanted = stretch / (2 * self.ratio)
        return rank, max(1 - wanted / left, 0.0) if left else 0.0

    def _term(self, rank: int, counts: tuple[int, ...] = ()) -> Banded:
        return Banded(
            ranks=(rank,), widths=(16,), group=0, masked=True, seed=self.seed, counts=counts
        )


def drop_rates(singular: torch.Tensor, gamma: float, power: float) -> torch.Tensor:
    """Share of entries that each vector drops, float64 `[r]`, ascending, its mean gamma or just above.

    Args:
        singular: singular values, descending.
        gamma: the mean to reach.
        power: the paper's C.
    """
    values = singular.to(torch.float64)
    relative = values / values[0].clamp_min(1e-300)
    drop = ((1 - relative**power) * gamma).clamp(0, gamma)
    # From the tail on vectors lose all that they have; the first never does.
    missing = gamma * len(drop) - float(drop.sum())
    for k in range(len(drop) - 1, 0, -1):
        if missing <= 0:
            break
        missing -= 1 - float(drop[k])
        drop[k] = 1
    return drop
