"""`deltazip`: 2:4 sparsity and 2 or 4 bits, every error mended by the columns behind it.

DeltaZip / DeltaCompress (Yao et al., arXiv 2312.05215, section 4, and their code), layer by layer:

1. `H` is the second moment of the layer's inputs in the model whose earlier layers are compressed
   already, damped by a hundredth of its mean diagonal; `H^-1 = U^T U`.
2. Of every four columns, the two entries of each row with the smallest `w^2 / U_jj^2` are dropped.
3. The others are rounded to a grid of the row: step `2 max|D| / (2^b - 1)`, levels from `-2^(b-1)` to
   `2^(b-1) - 1` steps.
4. What a column loses is pushed to the later ones.

Left out: the lossless pass over the result (GDeflate). Norms, embeddings and the output layer are the
recipe's business; there the authors keep the base's norms, and tables in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.methods.moments import weighted
from deltafold.compress.obs import Settle, damped, inverse_cholesky, sweep
from deltafold.compress.terms import NM, Context, Encoded, Term
from deltafold.compress.terms.grids import Coded, Grid, Scales

_KEEP, _OF = 2, 4


@method
@dataclass(frozen=True)
class DeltaZip:
    """2:4 codes with error feedback.

    Tensors whose layer's inputs were not seen, embeddings above all, get the largest two of four on the
    best grid: a poor form, so give them a codec of their own. So do layers that compute `x W` (Conv1D).

    Attributes:
        bits: of a kept entry, 2 or 4.
        damp: share of the mean second moment that is added to each input's own.
    """

    id: ClassVar[str] = "deltazip"
    summary: ClassVar[str] = "2:4 sparse 2- or 4-bit codes with error feedback"
    paper: ClassVar[str] = "2312.05215"
    needs: ClassVar[tuple[Need, ...]] = ("activations", "sequential")
    applied: ClassVar[str] = "sparse on the fly, or rebuilt at load"
    on_device: ClassVar[bool] = True

    bits: int = 4
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.bits not in (2, 4) or not self.damp > 0:
            raise DeltafoldError("bad-recipe", "deltazip: bits must be 2 or 4, damp above 0")

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `nm` term."""
        known, term = weighted(delta, context), self._term()
        if known is None or known.turned or not delta.numel():
            return [term.encode(delta, context)]
        positions, coded = prune_and_round(known.matrix, known.moment, term.grid, self.damp)
        return [term.assemble(positions, coded)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `nm` term."""
        return [self._term()]

    def _term(self) -> NM:
        return NM(keep=_KEEP, of=_OF, bits=self.bits)


def prune_and_round(
    matrix: torch.Tensor, moment: torch.Tensor, grid: Grid, damp: float
) -> tuple[torch.Tensor, Coded]:
    """Steps 2 to 4 for a matrix float32 `[N, M]` with second moments `[M, M]`.

    Returns:
        Places of the kept entries within their blocks of four, int64 `[N, K]`, and their codes.
    """
    rows, columns = matrix.shape
    step = matrix.abs().amax(dim=1, keepdim=True) * (2 / (2**grid.bits - 1))
    middle = torch.full_like(step, 2 ** (grid.bits - 1), dtype=torch.uint8)
    scales = grid.rounded(Scales(step, middle))
    positions: list[torch.Tensor] = []
    wide = (rows, -(-columns // _OF) * _OF)
    codes = matrix.new_full(wide, 2 ** (grid.bits - 1), dtype=torch.uint8)

    def choose(start: int, now: torch.Tensor, diagonal: torch.Tensor) -> Settle:
        score = (now / diagonal).square()
        # The last block may be short: what is not there is kept only where nothing else is left.
        score = torch.nn.functional.pad(score, (0, _OF - now.shape[1]), value=-1.0)
        best = score.argsort(dim=1, descending=True, stable=True)[:, :_KEEP]
        kept = now.new_zeros(rows, _OF, dtype=torch.bool).scatter_(1, best, True)
        positions.append(best.sort(dim=1).values)

        def settle(j: int, column: torch.Tensor) -> torch.Tensor:
            coded = grid.quantise(column.unsqueeze(1), scales)
            codes[:, start + j] = coded.codes[:, 0]
            return torch.where(kept[:, j], grid.values(coded)[:, 0], 0.0)

        return settle

    sweep(matrix, inverse_cholesky(damped(moment, damp)), choose, group=_OF)
    places = torch.cat(positions, dim=1)
    starts = torch.arange(places.shape[1], device=places.device) // _KEEP * _OF
    return places, Coded(codes.gather(1, places + starts), scales)
