"""`safe-delta`: take from the fine-tune what an aligned model's answers to harmful prompts can bear.

Source: Lu et al., Safe Delta (arXiv 2505.12038), and the authors' released code for the constants. With
H the second moments of a layer's inputs on safe examples (harmful instructions with refusals, run
through the aligned model) and `H^-1 = U^T U`, an entry of the fine-tune costs `D_ij^2 / U_jj^2`. In
every block of columns, entries are taken from the cheapest column on while their costs stay within

    mean(1 / U_jj^2) * budget / 2 * N / 4096

except those of the 15 % most expensive. What was taken moves the layer's answers; the columns behind
make up for it, as in optimal brain surgery (`obs.py`), whether taken from the fine-tune or not.

One difference: errors are pushed on column by column, where the code waits for four columns. The
code's order is kept: blocks of 2,048 columns, costs by what is left to change when the block begins.

Tensors that no linear layer multiplies by (norms, embeddings) stay the aligned model's, as in the code;
it leaves out the head as well, for which a pattern is to be given:
`--edit 'model.layers.*=safe-delta'`. The result is dense: use it before a codec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.obs import Settle, damped, inverse_cholesky, sweep
from deltafold.compress.terms import Context, rows_and_columns

_BLOCK: Final = 2048
_EXCLUDED: Final = 0.15


@edit
@dataclass(frozen=True)
class SafeDelta:
    """Entries of the fine-tune within a safety budget, the rest compensated.

    The base must be the aligned model; second moments are those of its inputs on safe examples.

    Attributes:
        budget: the paper's s.
        damp: share of the mean second moment that is added to all.
    """

    id: ClassVar[str] = "safe-delta"
    summary: ClassVar[str] = (
        "take from the fine-tune what a safety budget allows, compensate the rest"
    )
    paper: ClassVar[str] = "after 2505.12038"
    needs: ClassVar[tuple[Need, ...]] = ("safe-activations",)

    budget: float = 0.1
    damp: float = 0.01

    def __post_init__(self) -> None:
        if not (self.budget >= 0 and 0 < self.damp < math.inf):
            raise DeltafoldError(
                "bad-recipe", "safe-delta: budget must not be negative, damp above 0"
            )

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """What was taken, and its compensation; zero for tensors of no linear layer."""
        safe = None if context.evidence is None else context.evidence.safe
        moments = None if safe is None else safe.second_moment
        if moments is None or not delta.numel():
            return torch.zeros_like(delta)
        shape = rows_and_columns(tuple(delta.shape))
        return self.take(delta.reshape(shape), moments).reshape(delta.shape)

    def take(self, wanted: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        """What becomes of a float32 `[N, M]` fine-tune minus aligned model."""
        allowed = self.budget / 2 * wanted.shape[0] / 4096

        def choose(start: int, now: torch.Tensor, diagonal: torch.Tensor) -> Settle:
            target = wanted[:, start : start + now.shape[1]]
            accepted = _accepted(target - now, diagonal, allowed)

            def settle(j: int, column: torch.Tensor) -> torch.Tensor:
                return torch.where(accepted[:, j], target[:, j], column)

            return settle

        upper = inverse_cholesky(damped(moments, self.damp))
        return sweep(torch.zeros_like(wanted), upper, choose, group=_BLOCK)


def _accepted(change: torch.Tensor, diagonal: torch.Tensor, allowed: float) -> torch.Tensor:
    """Which entries of a block `[N, columns]` are taken from the fine-tune."""
    price = diagonal.to(torch.float64) ** -2
    costs = change.to(torch.float64).square() * price
    # All entries of a column have one price, so they are sorted column by column.
    order = price.argsort(stable=True)
    running = costs[:, order].T.reshape(-1).cumsum(0)
    within = running <= price.mean() * allowed
    count = change.numel()
    within[count - int(_EXCLUDED * count) :] = False
    accepted = torch.zeros_like(change, dtype=torch.bool)
    accepted[:, order] = within.reshape(len(order), -1).T
    return accepted
