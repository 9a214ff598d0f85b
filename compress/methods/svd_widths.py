"""`svd-widths`: a low rank whose singular vectors get as many bits each as they are worth.

After PrinMix (arXiv 2506.11087), which gives every singular vector a width of its own by an integer
program over the errors `sigma_i^2 (dv_i H dv_i^T)` at the layer's outputs. Here the errors of U count
as well, `sigma_i^2 |du_i|^2 (v_i H v_i^T)`, dropping a vector is one of the widths, and the program is
relaxed by a multiplier on the bits: each vector takes the width with the least error plus price. Both
factors are then rounded as in `delta-come`; the paper's correction of U's target has no closed form in
print, and U's rounding with the second moments of `S V^T x` stands in for it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.methods.delta_come import DeltaCome, code_bands
from deltafold.compress.methods.moments import Weighted, weighted
from deltafold.compress.terms import Banded, Context, Encoded, Term, rows_and_columns
from deltafold.compress.terms.grids import Grid
from deltafold.compress.terms.lowrank import truncated_svd

#: Bits that a vector may get; 0 drops it.
_WIDTHS: Final = (0, 2, 3, 4, 6, 8)


@method
@dataclass(frozen=True)
class SvdWidths:
    """Bands of vectors of one width; `delta-come`'s fixed bands where no inputs were seen.

    Attributes:
        bits: codes a weight that the vectors may take in all; scales come on top.
        group: entries of a vector that share a scale.
        damp: share of the mean second moment that is added to each input's own.
    """

    id: ClassVar[str] = "svd-widths"
    summary: ClassVar[str] = "low rank, a width for each singular vector, error feedback"
    paper: ClassVar[str] = "after 2506.11087"
    needs: ClassVar[tuple[Need, ...]] = ("activations", "sequential")
    applied: ClassVar[str] = "low rank on the fly"
    on_device: ClassVar[bool] = True

    bits: float = 1.0
    group: int = 128
    damp: float = 0.01

    def __post_init__(self) -> None:
        try:
            self._fixed()
        except DeltafoldError as error:
            message = error.message.replace("delta-come", self.id)
            raise DeltafoldError(error.code, message) from error

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `banded` term."""
        shape = tuple(delta.shape)
        known = weighted(delta, context)
        if known is None or not delta.numel():
            return self._fixed().encode(delta, context)
        factors = truncated_svd(known.matrix, min(known.matrix.shape))
        widths = self._widths(known, *factors)
        order = widths.argsort(descending=True, stable=True)[: max(int((widths > 0).sum()), 1)]
        # Even a budget for none buys one vector of the least width.
        bands = Counter(max(w, _WIDTHS[1]) for w in widths[order].cpu().tolist())
        term = Banded(ranks=tuple(bands.values()), widths=tuple(bands), group=self.group)
        left, singular, right = factors
        chosen = (left[:, order], singular[order], right[order])
        coded = code_bands(known, chosen, term, damp=self.damp, ordered=True)
        return [term.assemble(coded, rows_and_columns(shape), context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """A `banded` term of the same budget; its bands show when the inputs are known."""
        return self._fixed().plan(shape, dtype)

    def _fixed(self) -> DeltaCome:
        return DeltaCome(bits=self.bits, group=self.group, damp=self.damp)

    def _widths(
        self,
        known: Weighted,
        left: torch.Tensor,
        singular: torch.Tensor,
        right: torch.Tensor,
    ) -> torch.Tensor:
        errors = width_errors(known.moment, left, singular, right, self.group)
        rows, columns = known.matrix.shape
        return allot(errors, int(self.bits * rows * columns / (rows + columns)))


def width_errors(
    moment: torch.Tensor,
    left: torch.Tensor,
    singular: torch.Tensor,
    right: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """What each vector loses of the outputs at each of `_WIDTHS`: float64 `[r, widths]`."""
    weight = moment.double()

    def seen(vectors: torch.Tensor) -> torch.Tensor:
        wide = vectors.double()
        return ((wide @ weight) * wide).sum(dim=1)

    whole, errors = seen(right), []
    for width in _WIDTHS:
        if not width:
            errors.append(whole)
            continue
        grid = Grid(width, group, symmetric=False)
        off_v = right - grid.values(grid.code(right))
        off_u = left.T - grid.values(grid.code(left.T.contiguous()))
        errors.append(seen(off_v) + off_u.double().square().sum(dim=1) * whole)
    return singular.double().square().unsqueeze(1) * torch.stack(errors, dim=1)


def allot(errors: torch.Tensor, budget: int) -> torch.Tensor:
    """A width for each vector, their sum at most `budget`: int64 `[r]`.

    The price of a bit is moved until the budget is just kept; what the relaxed program leaves over is
    less than one vector's step.
    """
    widths = torch.tensor(_WIDTHS).to(errors.device)

    def at(price: float) -> torch.Tensor:
        return widths[(errors + price * widths).argmin(dim=1)]

    low, high = 0.0, float(errors.max()) + 1e-30
    if int(at(low).sum()) <= budget:
        return at(low)
    for _ in range(60):
        # Prices span many orders of magnitude, so the middle is a geometric one.
        middle = (max(low, high * 1e-12) * high) ** 0.5
        low, high = (low, middle) if int(at(middle).sum()) <= budget else (middle, high)
    return at(high)
