"""`emr`: elect, mask and rescale; one bit a weight for each delta, and one dense delta for all.

Source: Huang et al., "EMR-Merging" (arXiv 2405.17461), section 3, in the form of fusion_bench's code:

* elect: `g = sign(sum_t D_t)`, a sum of zero counting as minus; `E` has the sign `g` and the largest
  magnitude of the deltas that agree with it;
* mask: `M_t` keeps the entries where `D_t` and `E` have one sign;
* rescale: `c_t = sum over tensors of mean |D_t| / sum over tensors of mean |M_t E|`.

What a delta decodes to is `c_t M_t E`. Where `E` is stored with loss, masks and scales are those of the
stored one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.families.base import family
from deltafold.compress.terms import Context, Encoded, Shared


@family
@dataclass(frozen=True)
class Emr:
    """One elected delta, a mask and a scale for each member."""

    id: ClassVar[str] = "emr"
    summary: ClassVar[str] = "elected signs and magnitudes for all, a mask and a scale for each"
    paper: ClassVar[str] = "2405.17461"
    applied: ClassVar[str] = "mask on the shared delta on the fly"
    needs: ClassVar[tuple[Need, ...]] = ()

    def share(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        """`E`, float32 `[N, M]`."""
        total = torch.zeros_like(deltas[0])
        for delta in deltas:
            total += delta
        sign = torch.where(total > 0, 1.0, -1.0)
        largest = torch.zeros_like(total)
        for delta in deltas:
            # Agreeing entries are positive after this, all others fall below the zeros above.
            torch.maximum(largest, delta * sign, out=largest)
        return largest * sign

    def term(self, members: int) -> Shared:
        """Masked, one group."""
        return Shared()

    def weigh(self, delta: torch.Tensor, stored: torch.Tensor) -> tuple[float, float]:
        """Mean magnitudes: of the delta, and of what its mask takes."""
        took = torch.where(delta * stored > 0, stored, 0.0)
        own = float(delta.abs().mean(dtype=torch.float64))
        return own, float(took.abs().mean(dtype=torch.float64))

    def remainder(self, left: torch.Tensor, context: Context) -> list[Encoded]:
        """None."""
        return []
