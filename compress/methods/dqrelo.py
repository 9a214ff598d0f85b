"""`d-qrelo`: one sign plane, and a low rank of what it leaves.

Source: D-QRELO (arXiv 2604.16940, method section): `alpha = mean|D|`, `R = D - alpha sign(D)`,
`D^ = alpha sign(D) + U_r S_r V_r^T` with the decomposition of R and `r = ceil(N M rho / (N + M))`.
The paper prunes vectors by magnitude with a threshold that was not to be found; here a recipe keeps
vectors exactly unless it says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Context, Encoded, LowRank, Planes, Term, rows_and_columns


@method
@dataclass(frozen=True)
class DQrelo:
    """Signs and a low rank.

    Attributes:
        rho: share of the 16-bit tensor's size that the low rank may take, the paper's rho_1.
        first: what is taken from the delta, the other from the rest; "sign" is the paper's, which
            finds it better than "svd".
    """

    id: ClassVar[str] = "d-qrelo"
    summary: ClassVar[str] = "a sign plane, and a low rank of what it leaves"
    paper: ClassVar[str] = "2604.16940"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sign planes and low rank on the fly"

    rho: float = 0.0625
    first: Literal["sign", "svd"] = "sign"

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise DeltafoldError("bad-recipe", f"d-qrelo: rho must be in (0, 1], not {self.rho}")

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """A `planes` term and a `lowrank` term."""
        shape = tuple(delta.shape)
        signs, low = self._terms(shape)
        if self.first == "sign":
            plane = signs.encode(delta, context)
            return [plane, low.encode(delta - _decoded(plane, shape, context), context)]
        rank = low.encode(delta, context)
        return [signs.encode(delta - _decoded(rank, shape, context), context), rank]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """A `planes` term and a `lowrank` term."""
        return list(self._terms(shape))

    def _terms(self, shape: tuple[int, ...]) -> tuple[Planes, LowRank]:
        rows, columns = rows_and_columns(shape)
        rank = math.ceil(rows * columns * self.rho / max(rows + columns, 1))
        return Planes(1, "tensor", 0, "float32"), LowRank(rank=max(rank, 1))


def _decoded(encoded: Encoded, shape: tuple[int, ...], context: Context) -> torch.Tensor:
    return encoded.term.decode(encoded.parts, shape, context)
