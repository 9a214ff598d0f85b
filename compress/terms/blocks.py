"""A large tensor as blocks of rows, each coded by itself, so that packing never holds all of it.

Where a tensor is cut depends on its shape alone: the bytes are the same however much memory the
packing run had, and whatever ran beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch

from deltafold.compress.evidence import Evidence
from deltafold.compress.terms.base import (
    Checked,
    Context,
    Encoded,
    ExactTerm,
    Parts,
    PartSpec,
    Term,
    register,
    rows_and_columns,
)

#: Most entries of a block. A float32 difference of that size is 64 MiB.
BLOCK: Final = 2**24


@register
@dataclass(frozen=True)
class Blocks(Checked):
    """Blocks of rows of the tensor read as a matrix (`rows_and_columns`), from the top.

    Parts: `<k>.<part>`, the parts of block k's term for a tensor `[rows of the block, M]`.

    Attributes:
        rows: rows of every block but the last, which has what is left.
        inner: one term a block, or one for all where they are equal.
    """

    id: ClassVar[str] = "blocks"
    version: ClassVar[int] = 1

    rows: int = 1
    inner: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        self._require(self.rows >= 1, f"rows must be at least 1, not {self.rows}")
        self._require(all(isinstance(t, Term) for t in self.inner), "inner must be terms")
        self._require(not any(isinstance(t, Blocks) for t in self.inner), "blocks do not nest")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Code every block by the one inner term that is given."""
        assert len(self.inner) == 1, "one term to code all blocks with"
        matrix = delta.reshape(rows_and_columns(tuple(delta.shape)))
        pieces = [
            self.inner[0].encode(
                matrix[start:stop], block_context(context, start, self.rows, index)
            )
            for index, (start, stop) in enumerate(self._spans(matrix.shape[0]))
        ]
        return join(self.rows, pieces)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The blocks' differences one below the other, float32 of `shape`."""
        blocks = [
            term.decode(inner, inner_shape, block)
            for term, inner, inner_shape, block in self.each(parts, shape, context)
        ]
        return torch.cat(blocks).reshape(shape) if blocks else torch.zeros(shape)

    def restore(
        self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, context: Context
    ) -> torch.Tensor:
        """The fine-tune's tensor, where all inner terms are exact (see `is_exact`)."""
        blocks = []
        for term, inner, inner_shape, block in self.each(parts, shape, context):
            assert isinstance(term, ExactTerm)
            blocks.append(term.restore(inner, inner_shape, dtype, block))
        return torch.cat(blocks).reshape(shape) if blocks else torch.zeros(shape, dtype=dtype)

    def each(
        self, parts: Parts, shape: tuple[int, ...], context: Context
    ) -> Iterator[tuple[Term, dict[str, torch.Tensor], tuple[int, int], Context]]:
        """Every block: its term, its parts, its shape `[rows, M]`, and its part of the context."""
        rows, columns = rows_and_columns(shape)
        for index, (start, stop) in enumerate(self._spans(rows)):
            prefix = f"{index}."
            inner = {k[len(prefix) :]: v for k, v in parts.items() if k.startswith(prefix)}
            block = block_context(context, start, self.rows, index)
            yield self.term(index), inner, (stop - start, columns), block

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        rows, columns = rows_and_columns(shape)
        specs: dict[str, PartSpec] = {}
        for index, (start, stop) in enumerate(self._spans(rows)):
            for key, spec in self.term(index).parts((stop - start, columns)).items():
                specs[f"{index}.{key}"] = spec
        return specs

    def _spans(self, rows: int) -> list[tuple[int, int]]:
        return [(start, min(start + self.rows, rows)) for start in range(0, rows, self.rows)]

    def term(self, index: int) -> Term:
        """The term of a block."""
        return self.inner[index if len(self.inner) > 1 else 0]


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows of a block of a tensor of this shape, 0 where it stays in one piece; part of the format."""
    if len(shape) < 2 or math.prod(shape) <= BLOCK:
        return 0
    return max(BLOCK // rows_and_columns(shape)[1], 1)


def join(rows: int, pieces: Iterable[Encoded]) -> Encoded:
    """Coded blocks as one term."""
    terms: list[Term] = []
    parts: dict[str, torch.Tensor] = {}
    for index, (term, inner) in enumerate(pieces):
        terms.append(term)
        parts |= {f"{index}.{key}": value for key, value in inner.items()}
    same = all(term == terms[0] for term in terms)
    return Encoded(Blocks(rows, tuple(terms[:1] if same else terms)), parts)


def block_context(context: Context, start: int, rows: int, index: int) -> Context:
    """A tensor's context cut to `rows` rows of its matrix (fewer at its end) from `start`.

    Random masks differ by block.
    """
    stop = start + rows

    def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return tensor.reshape(rows_and_columns(tuple(tensor.shape)))[start:stop]

    def seen(evidence: Evidence | None) -> Evidence | None:
        if evidence is None:
            return None
        return replace(
            evidence,
            gradient=cut(evidence.gradient),
            fisher=cut(evidence.fisher),
            references={r: t for r, v in evidence.references.items() if (t := cut(v)) is not None},
            safe=seen(evidence.safe),
        )

    return replace(
        context,
        name=f"{context.name}[{index}]",
        base=cut(context.base),
        variant=cut(context.variant),
        evidence=seen(context.evidence),
    )
