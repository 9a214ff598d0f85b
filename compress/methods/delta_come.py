"""`delta-come`: a low rank in bands of falling width, both factors rounded with error feedback.

Delta-CoMe (Ping et al., arXiv 2406.08903, section 3): the singular vectors of the delta in bands, by
default two of 8 bits, 32 of 3 and as many of 2 bits as the budget allows; what is left is dropped. In
each band first V is rounded with the second moments of the layer's inputs x, then U with those of
`S V^T x`, V as rounded. Layers see the inputs that the compressed layers before them give.

What differs from the authors' code: U's scales run along its vectors, as V's do, and not across them; S
is folded into V's scales, in float16 and not bfloat16; act-order fits all scales before the sweep; the
ranges of grids are fitted and not the full ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.methods.feedback import code_with_feedback
from deltafold.compress.methods.moments import Weighted, weighted
from deltafold.compress.obs import Settle, damped, inverse_cholesky, sweep
from deltafold.compress.terms import Banded, Context, Encoded, Term, rows_and_columns
from deltafold.compress.terms.grids import Coded, Grid, Scales
from deltafold.compress.terms.lowrank import truncated_svd

#: Vectors of the leading bands, and the bits of all three.
_LEADING, _WIDTHS = (2, 32), (8, 3, 2)


@method
@dataclass(frozen=True)
class DeltaCome:
    """Bands of 8, 3 and 2 bits.

    Tensors whose layer's inputs were not seen get the same bands, each code the nearest.

    Attributes:
        bits: codes a weight that the vectors may take in all; scales come on top.
        group: entries of a vector that share a scale.
        damp: share of the mean second moment that is added to each input's own.
        ordered: round the inputs with the largest second moments first (act-order).
    """

    id: ClassVar[str] = "delta-come"
    summary: ClassVar[str] = "low rank in bands of 8, 3 and 2 bits, with error feedback"
    paper: ClassVar[str] = "after 2406.08903"
    needs: ClassVar[tuple[Need, ...]] = ("activations", "sequential")
    applied: ClassVar[str] = "low rank on the fly"
    on_device: ClassVar[bool] = True

    bits: float = 1.0
    group: int = 128
    damp: float = 0.01
    ordered: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.bits <= 16 and self.group >= 0 and self.damp > 0):
            raise DeltafoldError(
                "bad-recipe", "delta-come: bits must be above 0 and at most 16, damp above 0"
            )

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `banded` term."""
        shape = tuple(delta.shape)
        known, term = weighted(delta, context), self._term(shape)
        if known is None or not delta.numel():
            return [term.encode(delta, context)]
        factors = truncated_svd(known.matrix, term.rank(shape))
        coded = code_bands(known, factors, term, damp=self.damp, ordered=self.ordered)
        return [term.assemble(coded, rows_and_columns(shape), context)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `banded` term."""
        return [self._term(shape)]

    def _term(self, shape: tuple[int, ...]) -> Banded:
        rows, columns = rows_and_columns(shape)
        room = int(self.bits * rows * columns / max(rows + columns, 1))
        bands: list[tuple[int, int]] = []
        for most, width in zip((*_LEADING, room), _WIDTHS, strict=True):
            rank = min(most, room // width)
            room -= rank * width
            bands += [(rank, width)] if rank else []
        bands = bands or [(1, _WIDTHS[-1])]
        ranks, widths = zip(*bands, strict=True)
        return Banded(ranks=ranks, widths=widths, group=self.group)


def code_bands(
    known: Weighted,
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    term: Banded,
    *,
    damp: float,
    ordered: bool,
) -> list[torch.Tensor | Coded]:
    """What `Banded.assemble` takes: both factors of every band, rounded with error feedback.

    Args:
        known: the delta with its second moments.
        factors: `U [N, r]`, `S [r]`, `V^T [r, M]` of it, in the order of the term's bands.
        term: the layout.
        damp: see `obs.damped`.
        ordered: see `code_with_feedback`.
    """
    left, singular, right = factors
    coded: list[torch.Tensor | Coded] = []
    for first, last, width in term.bands((left.shape[0], right.shape[1])):
        values, grid = singular[first:last], term.grid(width)
        v = code_with_feedback(right[first:last], known.moment, grid, damp=damp, ordered=ordered)
        seen = (values.unsqueeze(1) * grid.values(v)).double()
        inner = seen @ known.moment.double() @ seen.T
        u = code_vectors(left[:, first:last], inner, grid, damp)
        v = Coded(v.codes, Scales(v.scales.step * values.unsqueeze(1), v.scales.zero))
        coded += [u, v] if known.turned else [v, u]
    return coded


def code_vectors(left: torch.Tensor, moment: torch.Tensor, grid: Grid, damp: float) -> Coded:
    """Round vectors one after the other, each one's error mended by those behind it.

    Args:
        left: float32 `[N, r]`, a vector a column.
        moment: float64 `[r, r]`, second moments of what the vectors are multiplied by.
        grid: along each vector.
        damp: see `obs.damped`.

    Returns:
        Codes `[r, N]`, a vector a row.
    """
    found: list[Coded] = []

    def choose(start: int, now: torch.Tensor, diagonal: torch.Tensor) -> Settle:
        def settle(j: int, column: torch.Tensor) -> torch.Tensor:
            found.append(grid.code(column.unsqueeze(0)))
            return grid.values(found[-1])[0]

        return settle

    sweep(left, inverse_cholesky(damped(moment, damp)), choose)
    codes = torch.cat([c.codes for c in found])
    step, zero = (torch.cat(parts) for parts in zip(*(c.scales for c in found), strict=True))
    return Coded(codes, Scales(step, zero))
