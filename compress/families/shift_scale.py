"""`shift-scale`: one shift of the base for all, a factor and the compressed rest for each.

After "Dynamic Base Model Shift for Delta Compression" (DBMS, arXiv 2505.11344), see the codec of the
same name for what is public of it. Here the vector B along which the base is shifted is shared: the
mean of the deltas, as it is stored. A delta is

    D^_t = shift_t * B + scale * C(D_t - shift_t * B)

with one `shift_t` for the whole model, the least-squares factor over all shared tensors. The worth of
this depends on what the fine-tunes have in common, for which they must go the same way from the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.families.base import family
from deltafold.compress.methods import Method, parse_spec
from deltafold.compress.methods.shift_scale import refuse_inner
from deltafold.compress.terms import Context, Encoded, Shared, scaled


@family
@dataclass(frozen=True)
class ShiftScaleFamily:
    """A shared mean, a factor and a rest for each member.

    Attributes:
        rest: codec of what the shift leaves.
        scale: factor of the rest, not 0.
    """

    id: ClassVar[str] = "shift-scale"
    summary: ClassVar[str] = "the deltas' mean for all, a factor of it and the rest for each"
    paper: ClassVar[str] = "after 2505.11344"
    applied: ClassVar[str] = "the shared delta, and the rest as its codec"
    needs: ClassVar[tuple[Need, ...]] = ()

    rest: str = "bitdelta"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise DeltafoldError("bad-recipe", "shift-scale: scale must not be 0")
        refuse_inner("shift-scale", self.codec)
        if self.codec.needs:
            raise DeltafoldError("bad-recipe", "shift-scale: rest must be a codec without needs")

    @cached_property
    def codec(self) -> Method:
        """Of the rest."""
        return parse_spec(self.rest)

    def share(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        """The mean, float32 `[N, M]`."""
        total = torch.zeros_like(deltas[0])
        for delta in deltas:
            total += delta
        return total / len(deltas)

    def term(self, members: int) -> Shared:
        """All of it, one group."""
        return Shared(masked=False)

    def weigh(self, delta: torch.Tensor, stored: torch.Tensor) -> tuple[float, float]:
        """`<D, B>` and `<B, B>`."""
        wide = stored.to(torch.float64)
        return float((delta * wide).sum()), float((wide * wide).sum())

    def remainder(self, left: torch.Tensor, context: Context) -> list[Encoded]:
        """The rest in its codec."""
        found = self.codec.encode(left, context)
        return found if self.scale == 1 else [scaled(encoded, self.scale) for encoded in found]
