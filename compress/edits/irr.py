"""`irr`: remove what points away from safety, recalibrate what stays.

Source: Wu et al., "Separate the Wheat from the Chaff" (IRR, arXiv 2412.11041), and the authors'
released code for the steps. The safety vector is the aligned model minus an unaligned one. In every
block of columns

1. identify: entries whose sign is not the safety vector's;
2. remove: of these all but the share `spare` with the least Fisher information of the aligned model
   on safe answers to harmful prompts, the mean squared gradient of an example;
3. recalibrate: the columns behind make up for what was removed, by the second moments of the task's
   inputs, as in SparseGPT (`obs.py`).

Two differences: the code reads a layer's inputs behind layers that were already edited, here they are
those of the fine-tune as it came; and it squares the mean gradient of eight examples, here of each.
Tensors that no linear layer multiplies by are left as they are.

The aligned model is the base, unless a reference `aligned` is given; the fine-tune's delta is taken
against the base in any case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.edits.base import edit
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need, known
from deltafold.compress.obs import Settle, damped, inverse_cholesky, sweep
from deltafold.compress.terms import Context, rows_and_columns


@edit
@dataclass(frozen=True)
class Irr:
    """Remove entries against the safety vector, recalibrate the others.

    Attributes:
        spare: share of the identified entries that stay, those that matter least for safety; the
            code's `sparsity`.
        block: columns that are compared with each other.
        more: identify all entries; those with the safety vector's sign are removed last.
        damp: share of the mean second moment that is added to all.
    """

    id: ClassVar[str] = "irr"
    summary: ClassVar[str] = "remove entries that point away from safety, recalibrate the others"
    paper: ClassVar[str] = "after 2412.11041"
    needs: ClassVar[tuple[Need, ...]] = ("activations", "reference", "safe-gradients")

    spare: float = 0.0
    block: int = 128
    more: bool = False
    damp: float = 0.01

    def __post_init__(self) -> None:
        if not (0 <= self.spare <= 1 and self.block >= 1 and 0 < self.damp < math.inf):
            raise DeltafoldError(
                "bad-recipe", "irr: spare must be in [0, 1], block 1 or more, damp above 0"
            )

    def apply(self, delta: torch.Tensor, context: Context) -> torch.Tensor:
        """Zero where removed, the recalibrated delta elsewhere."""
        moments = None if context.evidence is None else context.evidence.second_moment
        if moments is None or not delta.numel():
            return delta.clone()
        safety = -_reference_delta(context, "unaligned", self.id)
        if _has_reference(context, "aligned"):
            safety += _reference_delta(context, "aligned", self.id)
        assert context.evidence is not None
        fisher = known(context.evidence.safe, "fisher", self.id, context.name)
        shape = rows_and_columns(tuple(delta.shape))
        matrix, safety, fisher = (t.reshape(shape) for t in (delta, safety, fisher))
        found = self.remove(matrix, safety, fisher, moments)
        return found.reshape(delta.shape)

    def remove(
        self, delta: torch.Tensor, safety: torch.Tensor, fisher: torch.Tensor, moments: torch.Tensor
    ) -> torch.Tensor:
        """The edited delta; all float32 `[N, M]`, the second moments `[M, M]`."""
        signs = safety.sign()

        def choose(start: int, now: torch.Tensor, diagonal: torch.Tensor) -> Settle:
            part = slice(start, start + now.shape[1])
            removed = self._removed(now.sign() != signs[:, part], fisher[:, part])
            return lambda j, column: torch.where(removed[:, j], 0.0, column)

        # An input that is always zero tells nothing of its column.
        alive = torch.where(moments.diagonal() > 0, delta, 0.0)
        upper = inverse_cholesky(damped(moments, self.damp))
        return sweep(alive, upper, choose, group=self.block)

    def _removed(self, against: torch.Tensor, fisher: torch.Tensor) -> torch.Tensor:
        score = torch.where(against, fisher, -fisher)
        if self.more:
            against = torch.ones_like(against)
        candidates = against.reshape(-1).nonzero().reshape(-1)
        order = score.reshape(-1)[candidates].argsort(stable=True)
        removed = torch.zeros(against.numel(), dtype=torch.bool)
        removed[candidates[order[int(len(order) * self.spare) :]]] = True
        return removed.reshape(against.shape)


def _has_reference(context: Context, role: str) -> bool:
    """Whether a checkpoint of this role was given."""
    return context.evidence is not None and role in context.evidence.references


def _reference_delta(context: Context, role: str, who: str) -> torch.Tensor:
    """A reference's tensor minus the base's, float32.

    Raises:
        DeltafoldError: `needs-calibration` where no checkpoint has this role; `shape-mismatch` where
            its tensor has another shape than the base's.
    """
    if context.evidence is None or role not in context.evidence.references:
        raise DeltafoldError(
            "needs-calibration",
            f"{who} needs a checkpoint with the role {role!r}, and {context.name} has none.",
            fix=f"give it as the reference {role!r}",
        )
    assert context.base is not None
    other = context.evidence.references[role]
    if other.shape != context.base.shape:
        raise DeltafoldError(
            "shape-mismatch",
            f"{context.name} has another shape in the reference {role!r} than in the base.",
            facts=[("base", list(context.base.shape)), (role, list(other.shape))],
            fix="check that the reference is a model of the same architecture",
        )
    return other.to(torch.float32) - context.base.to(torch.float32)
