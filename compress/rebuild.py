"""A fine-tune's tensor made of base and delta in pieces: rows from the top, so that a large one never
lies in memory as a whole. What a piece holds is, bit for bit, what `DeltaRepo.restored` has there.

Packing cuts large tensors into blocks of rows, and so are they rebuilt. Terms that look at a whole
tensor (`lowrank`, `sparse`, `dct`, ...) give it in one piece.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypeVar

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.quantized import dequantized
from deltafold.compress.repo import DeltaRepo, pad_rows
from deltafold.compress.scratch import Scratch
from deltafold.compress.shapes import rows_and_columns
from deltafold.compress.terms import Blocks, Context, ExactTerm, Parts, Rows, Term, blocks

Item = TypeVar("Item")
#: What is added to float32 as it would be if it were float32 itself.
_NARROW: Final = (torch.bfloat16, torch.float16, torch.float32)
_Coded: TypeAlias = Sequence[tuple[Term, Parts]]


def restored_pieces(
    repo: DeltaRepo, source: Checkpoint, name: str, dtype: torch.dtype | None = None
) -> Iterator[torch.Tensor]:
    """One tensor of the fine-tune, row by row: pieces that follow each other in memory order.

    While one piece is used the next one is made.

    Args:
        repo: the delta.
        source: its base.
        name: one of the fine-tune's tensors.
        dtype: what floating-point tensors are rounded to; None for their own.

    Raises:
        DeltafoldError: `checksum`, before the first piece where the payload was damaged, after the last
            one where a tensor that is stored exactly came back otherwise.
    """
    exact = name in repo.manifest.tensors and repo.exact(name)
    total = hashlib.sha256()
    for piece in _ahead(_Tensor.of(repo, source, name).pieces(wide=dtype is not None)):
        if exact:
            total.update(dtypes.raw_bytes(piece).numpy().data)
        cast = dtype if dtype is not None and piece.is_floating_point() else piece.dtype
        yield piece.to(cast)
    if exact and total.hexdigest() != repo.entry(name).sha256:
        raise not_restored(repo, name)


def restored_tensor(
    repo: DeltaRepo, source: Checkpoint, name: str, dtype: torch.dtype | None
) -> torch.Tensor:
    """All pieces of a tensor in one; arguments and errors as for `restored_pieces`."""
    coded, own = repo.manifest.tensors.get(name), repo.named(source).own(name)
    assert coded is not None or own is not None, name
    shape = source.spec(str(own)).shape if coded is None else tuple(coded.shape)
    out, done = None, 0
    for piece in restored_pieces(repo, source, name, dtype):
        if out is None:
            out = torch.empty(math.prod(shape), dtype=piece.dtype)
        out[done : done + piece.numel()] = piece.reshape(-1)
        done += piece.numel()
    assert out is not None, name
    assert done == out.numel(), name
    return out.reshape(shape)


def not_restored(repo: DeltaRepo, name: str) -> DeltafoldError:
    """The error for an exactly stored tensor that came back otherwise."""
    return DeltafoldError(
        "checksum",
        f"{repo.folder}: {name} did not come back as the fine-tune's own tensor.",
        fix="this is a bug or a damaged file; pack the fine-tune again",
    )


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one being made while one is used."""
    with ThreadPoolExecutor(1, "deltafold-rebuild") as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the fine-tune, and all that it is made of.

    Attributes:
        repo: the delta.
        source: the base.
        name: the fine-tune's name of it.
        own: the base's name of it, None where it has none such.
        shape: the fine-tune's, read as a matrix `[N, M]`.
        base_rows: the base's, 0 where it has none.
        memory: to work in.
    """

    repo: DeltaRepo
    source: Checkpoint
    name: str
    own: str | None
    shape: tuple[int, int]
    base_rows: int
    memory: Scratch = field(default_factory=Scratch)

    @classmethod
    def of(cls, repo: DeltaRepo, source: Checkpoint, name: str) -> _Tensor:
        own = repo.named(source).own(name)
        coded = repo.manifest.tensors.get(name)
        base_shape = None if own is None else source.spec(own).shape
        shape = tuple(coded.shape) if coded is not None else base_shape
        assert shape is not None, name
        base_rows = 0 if base_shape is None else rows_and_columns(base_shape)[0]
        return cls(repo, source, name, own, rows_and_columns(shape), base_rows)

    def pieces(self, *, wide: bool) -> Iterator[torch.Tensor]:
        """The tensor; what is not exact in float32 if `wide`, in its own dtype otherwise."""
        if self.name not in self.repo.manifest.tensors:
            for start, stop in self._spans(0, self.shape[0]) or [(0, 0)]:
                yield self._stored(start, stop)
            return
        terms, stored = self.repo.terms(self.name), self.repo.stored(self.name)
        rows = [term for term in terms if isinstance(term, Rows)]
        inner = _cut([term.inner for term in rows] if rows else terms)
        plain = len(self.repo.entry(self.name).shape) == 2
        made: Iterator[torch.Tensor]
        if len(rows) == len(terms) and plain and (inner or self._is_small(rows[0].count)):
            self.repo.check_parts(self.name)
            made = self._changed_rows(rows, stored, inner)
        elif inner and not rows:
            self.repo.check_parts(self.name)
            made = self._blocks(terms, stored, inner)
        else:
            made = iter([self._whole()])
        if self.repo.exact(self.name):
            yield from made
            return
        dtype = dtypes.TORCH[self.repo.entry(self.name).dtype]
        with self.memory:
            for piece in made:
                # A copy: sums are made in memory that the next one takes again.
                yield piece.to(piece.dtype if wide else dtype, copy=True)

    def _whole(self) -> torch.Tensor:
        base = self.repo.base_tensor(self.source, self.name)
        if self.repo.exact(self.name):
            return self.repo.restored(self.name, base)
        return _added(base, self.repo.delta(self.name, base))

    def _blocks(
        self, terms: tuple[Term, ...], stored: Sequence[Parts], step: int
    ) -> Iterator[torch.Tensor]:
        """Blocks of rows as they were coded."""
        for number, (start, stop) in enumerate(_spans(0, self.shape[0], step)):
            base = self._base(start, stop)
            context = blocks.block_context(self._context(base), 0, stop - start, number)
            yield self._made(_nth(terms, stored, number), base, stop - start, context)

    def _changed_rows(
        self, terms: list[Rows], stored: Sequence[Parts], step: int
    ) -> Iterator[torch.Tensor]:
        """The base with its changed rows, and the added rows behind it."""
        first, shared = terms[0], self.shape[0] - terms[0].added
        index = first.checked_index(stored[0], shared, self.name)
        inner = [_Within(parts, "inner.") for parts in stored]
        done = 0
        for number, (a, b) in enumerate(_spans(0, len(index), step or len(index))):
            own, last = index[a:b], b == len(index)
            base = self._gathered(own)
            context = self._context(base)
            coded: _Coded = list(zip([t.inner for t in terms], inner, strict=True))
            if step:
                context = blocks.block_context(context, 0, b - a, number)
                coded = _nth([t.inner for t in terms], inner, number)
            changed = self._changes(coded, base, b - a, context)
            until = shared if last else int(index[b])
            for start, stop in self._spans(done, until):
                some = slice(*torch.searchsorted(own, torch.tensor([start, stop])).tolist())
                yield self._with_rows(start, stop, own[some] - start, changed[some])
            done = until
        for start, stop in self._spans(done, shared):
            yield self._with_rows(start, stop, index[:0], torch.empty(0, self.shape[1]))
        if first.added:
            added = stored[0]["added"]
            yield added if self.repo.exact(self.name) else _added(None, added.to(torch.float32))

    def _changes(
        self, coded: _Coded, base: torch.Tensor, rows: int, context: Context
    ) -> torch.Tensor:
        """Changed rows: as they are where they are exact, else what is added to the base's."""
        if self.repo.exact(self.name):
            return self._made(coded, base, rows, context)
        return _sum_of(coded, (rows, self.shape[1]), context, self.memory)

    def _with_rows(
        self, start: int, stop: int, index: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """The base's rows `[start, stop)` with some of them replaced, or added to."""
        base = self._base(start, stop)
        if self.repo.exact(self.name):
            out = base.to(dtypes.TORCH[self.repo.entry(self.name).dtype])
            out[index] = rows.to(out.dtype)
            return out
        delta = torch.zeros(stop - start, self.shape[1])
        delta[index] = rows
        return _added(base, delta)

    def _made(
        self,
        coded: _Coded,
        base: torch.Tensor,
        rows: int,
        context: Context,
    ) -> torch.Tensor:
        shape = (rows, self.shape[1])
        if not self.repo.exact(self.name):
            return _added(base, _sum_of(coded, shape, context, self.memory))
        ((term, parts),) = coded
        assert isinstance(term, ExactTerm)
        dtype = dtypes.TORCH[self.repo.entry(self.name).dtype]
        return term.restore(parts, shape, dtype, context)

    def _context(self, base: torch.Tensor) -> Context:
        return Context(self.name, base, shared=self.repo.shared)

    def _stored(self, start: int, stop: int) -> torch.Tensor:
        assert self.own is not None
        return self.source.matrix_rows(self.own, start, stop)

    def _base(self, start: int, stop: int) -> torch.Tensor:
        """Rows that differences are added to; zeros where the base has none."""
        assert self.own is not None
        base = self._stored(start, max(start, min(stop, self.base_rows)))
        quantization = self.repo.manifest.base_quantization
        if quantization is not None and self.name in self.repo.quantised:
            base = dequantized(self.name, base, quantization.method)
        padded = pad_rows(base, (stop - start, self.shape[1]))
        assert padded is not None
        return padded

    def _gathered(self, index: torch.Tensor) -> torch.Tensor:
        runs = _runs(index) if len(index) else [(0, 0)]
        return torch.cat([self._base(start, stop) for start, stop in runs])

    def _is_small(self, rows: int) -> bool:
        return rows * self.shape[1] <= blocks.BLOCK

    def _spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        return _spans(start, stop, max(blocks.BLOCK // max(self.shape[1], 1), 1))


class _Within(Mapping[str, torch.Tensor]):
    """Parts whose keys begin in the same way, without that beginning."""

    def __init__(self, parts: Parts, prefix: str) -> None:
        self._parts, self._prefix = parts, prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._parts[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        size = len(self._prefix)
        return (key[size:] for key in self._parts if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _cut(terms: Sequence[Term]) -> int:
    """Rows of a block that all terms have in common; 0 where they are not blocks of equal size."""
    steps = {term.rows if isinstance(term, Blocks) else 0 for term in terms}
    return steps.pop() if len(steps) == 1 else 0


def _nth(terms: Sequence[Term], stored: Sequence[Parts], number: int) -> _Coded:
    """The terms of one block, and their parts, read now."""
    found: list[tuple[Term, Parts]] = []
    for term, parts in zip(terms, stored, strict=True):
        assert isinstance(term, Blocks)
        found.append((term.term(number), dict(_Within(parts, f"{number}."))))
    return found


def _sum_of(
    coded: _Coded, shape: tuple[int, int], context: Context, memory: Scratch
) -> torch.Tensor:
    """The sum of some terms, in memory that the tensor's next sum takes again."""
    total = memory.lend("sum", shape).zero_()
    for term, parts in coded:
        total += term.decode(dict(parts), shape, context)
    return total


def _added(base: torch.Tensor | None, delta: torch.Tensor) -> torch.Tensor:
    """A difference plus the base's rows, in place."""
    if base is None:
        return delta
    if base.dtype not in _NARROW:
        base = base.to(torch.float32)
    if not delta.dim():
        return delta + base
    rows = min(base.shape[0], delta.shape[0])
    delta[:rows] += base[:rows]
    return delta


def _spans(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    return [(at, min(at + step, stop)) for at in range(start, stop, max(step, 1))]


def _runs(index: torch.Tensor) -> list[tuple[int, int]]:
    """Ascending numbers as runs of neighbours, `[start, stop)`."""
    cuts = ((index[1:] - index[:-1]) != 1).nonzero().reshape(-1) + 1
    edges = [0, *cuts.tolist(), len(index)]
    return [(int(index[a]), int(index[b - 1]) + 1) for a, b in itertools.pairwise(edges)]
