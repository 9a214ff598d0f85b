"""`ultradelta`: rates by deviation, codes and a drop within their levels, a factor by trace norms.

UltraDelta (arXiv 2505.13563), in the order of the authors' released code, which is for vision models:

1. *Quantise*: each tensor on an even grid of `2^bits` levels from its least to its largest entry.
2. *Mixed sparsity*: tensors by the standard deviation of what 1 gave, ascending. Those within the first
   third of all parameters drop `drop + step`, those within the second `drop`, and the others so much
   that the mean over parameters is `drop`, within 0 and 0.99.
3. *Drop*: of the entries of each level the same share, see `quantize-and-drop`.
4. *Rescale*: everything times `1 / (1 - drop)`, the global rate and not the tensor's own.
5. *Trace norms*: everything times `min_t n_t / n`, where n is the sum over matrices of the singular
   values of what 4 gave, and t goes over all fine-tunes that are compressed for one base. (The code
   divides the mean of all norms by n, and that by its largest value: the same number.) A fine-tune by
   itself keeps its size.

Layers are those that a recipe gives this codec; the authors take the linear ones. Other fine-tunes are
named by `--reference task=MODEL`. The factor is rounded to four digits, since singular values may
differ between machines in their last ones. The paper speaks of factors from 0.5 to 1; `gamma` fixes
one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, NamedTuple, Self

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need, is_task
from deltafold.compress.methods.base import method
from deltafold.compress.methods.quantize_and_drop import dropped_codes
from deltafold.compress.spec import SURVEYED
from deltafold.compress.terms import Context, Encoded, SparseCodes, Term, rows_and_columns
from deltafold.compress.terms.sparse_codes import even_table, nearest

_MOST: Final = 0.99


@method
@dataclass(frozen=True)
class UltraDelta:
    """All steps.

    Attributes:
        bits: of a code, 1 to 8.
        drop: share of zeros of the whole model, in [0, 1).
        step: by how much more the tensors of least deviation drop.
        gamma: factor of all that is kept; 0 takes the trace norms'.
        seed: of the drop.
        rates: of each tensor, once the model was surveyed; others drop `drop`.
        factor: by trace norms, once they were surveyed.
    """

    id: ClassVar[str] = "ultradelta"
    summary: ClassVar[str] = "codes, dropped within levels at rates by deviation, rescaled by norms"
    paper: ClassVar[str] = "2505.13563"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "sparse on the fly"

    bits: int = 4
    drop: float = 0.95
    step: float = 0.01
    gamma: float = 0.0
    seed: int = 0
    rates: tuple[tuple[str, float], ...] = field(default=(), metadata=SURVEYED)
    factor: float = field(default=1.0, metadata=SURVEYED)

    def __post_init__(self) -> None:
        if not (self.step >= 0 and self.drop >= 0 and self.drop + self.step < 1):
            raise DeltafoldError(
                "bad-recipe", "ultradelta: drop and step must be 0 or more, and below 1 together"
            )
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise DeltafoldError("bad-recipe", "ultradelta: gamma must be 0 or more")
        if not 1 <= self.bits <= 8:
            raise DeltafoldError("bad-recipe", "ultradelta: bits must be 1 to 8")
        self._term(self.drop)

    def survey(self, tensors: Iterable[tuple[torch.Tensor, Context]]) -> Self:
        """Rates of all tensors; with other fine-tunes the factor too, for which all are coded once."""
        tasks: set[str] = set()

        def noting() -> Iterator[tuple[str, torch.Tensor]]:
            for delta, context in tensors:
                tasks.update(_tasks(context))
                yield context.name, delta

        told = replace(self, rates=self._rates(noting()))
        if self.gamma or not tasks:
            return told
        own = told._norm((c.name, delta) for delta, c in tensors)
        norms = [own]
        for task in sorted(tasks):
            other = replace(self, rates=self._rates(_of_task(tensors, task)))
            norms.append(other._norm(_of_task(tensors, task)))
        return replace(told, factor=_rounded(min(norms) / own) if own > 0 else 1.0)

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `sparse-codes` term."""
        return [self._coded(delta, context.name, self.gamma or self.factor)]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `sparse-codes` term, its size as the mean rate promises."""
        return [self._term(self.drop)]

    def _coded(self, delta: torch.Tensor, name: str, factor: float) -> Encoded:
        rate = dict(self.rates).get(name, self.drop)
        found = dropped_codes(delta, self.bits, rate, seed=self.seed, name=name)
        return found.stored(self._term(rate), factor / (1 - self.drop))

    def _term(self, drop: float) -> SparseCodes:
        return SparseCodes(mask="runs", bits=self.bits, drop=drop)

    def _rates(self, deltas: Iterable[tuple[str, torch.Tensor]]) -> tuple[tuple[str, float], ...]:
        spreads = [
            Spread(name, delta.numel(), _deviation(delta, self.bits)) for name, delta in deltas
        ]
        return tuple(sorted(mixed_rates(spreads, self.drop, self.step).items()))

    def _norm(self, deltas: Iterable[tuple[str, torch.Tensor]]) -> float:
        """Sum of the singular values of all matrices, as they are coded."""
        total = 0.0
        for name, delta in deltas:
            if delta.dim() > 1 and delta.numel():
                shape = tuple(delta.shape)
                term, parts = self._coded(delta, name, 1.0)
                matrix = term.decode(parts, shape, Context(name)).reshape(rows_and_columns(shape))
                total += float(torch.linalg.svdvals(matrix).sum(dtype=torch.float64))
        return total


class Spread(NamedTuple):
    """A tensor's name, entries, and the standard deviation of its quantised entries."""

    name: str
    entries: int
    deviation: float


def mixed_rates(spreads: Iterable[Spread], drop: float, step: float) -> dict[str, float]:
    """Drop rates by tensor: more for those that spread least, `drop` on the mean over parameters.

    Args:
        spreads: one a tensor.
        drop: mean rate.
        step: what the first third drops more.
    """
    ordered = sorted(spreads, key=lambda s: (s.deviation, s.name))
    total, passed = sum(s.entries for s in ordered), 0
    rates: dict[str, float] = {}
    last: list[Spread] = []
    for spread in ordered:
        passed += spread.entries
        # In whole numbers: thirds of large models are no floats.
        if 3 * passed <= total:
            rates[spread.name] = drop + step
        elif 3 * passed <= 2 * total:
            rates[spread.name] = drop
        else:
            last.append(spread)
    spent = sum(s.entries * rates[s.name] for s in ordered if s.name in rates)
    left = sum(s.entries for s in last)
    rest = min(max((drop * total - spent) / left, 0.0), _MOST) if left else drop
    return rates | {s.name: rest for s in last}


def _deviation(delta: torch.Tensor, bits: int) -> float:
    flat = delta.reshape(-1)
    if flat.numel() < 2:
        return 0.0
    table = even_table(flat, bits)
    levels = table[nearest(flat, table).to(torch.int64)].to(torch.float64)
    return float(levels.std(correction=0))


def _tasks(context: Context) -> list[str]:
    known = context.evidence
    return [] if known is None else [role for role in known.references if is_task(role)]


def _of_task(
    tensors: Iterable[tuple[torch.Tensor, Context]], role: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Another fine-tune's deltas of the same tensors, those of the same shape."""
    for delta, context in tensors:
        assert context.base is not None
        other = context.evidence.references.get(role) if context.evidence else None
        if other is not None and other.shape[:1] >= delta.shape[:1]:
            shared = other[: delta.shape[0]]
            if shared.shape == delta.shape:
                yield context.name, shared.to(torch.float32) - context.base.to(torch.float32)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
