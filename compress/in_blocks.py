"""A tensor coded in blocks of rows: read once, hashed as it passes, never in memory as a whole.

Whether all rows are coded or only those that changed is known when all have been read. Most often all
are, so blocks are coded as they come until that looks wrong; if it was, the tensor is read again, the
second time from the system's cache, if there is room.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from deltafold.compress import dtypes, fast
from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.coded import Coded, Sink, TensorStats
from deltafold.compress.encode import not_lossless, refuse_not_finite, rows_count, too_large
from deltafold.compress.fast import Pair, Totals
from deltafold.compress.journal import Place
from deltafold.compress.manifest import Quantization
from deltafold.compress.methods import Method, PairMethod
from deltafold.compress.naming import NamedBase
from deltafold.compress.quantized import dequantized
from deltafold.compress.repo import pad_rows
from deltafold.compress.safetensors_file import Hash
from deltafold.compress.scratch import Scratch
from deltafold.compress.shapes import rows_and_columns
from deltafold.compress.terms import (
    Blocks,
    Context,
    Encoded,
    ExactTerm,
    MeasuredTerm,
    Rows,
    Term,
    is_exact,
)
from deltafold.compress.terms.blocks import block_context, block_rows

#: Rows are left out where fewer than this share of them changed.
_MOST: Final = 0.9


def code_in_blocks(
    name: str,
    source: NamedBase,
    target: Checkpoint,
    method: Method,
    sink: Sink,
    *,
    known: tuple[str | None, str | None] = (None, None),
    quantization: Quantization | None = None,
) -> Coded:
    """Read, hash and code one tensor.

    Args:
        name: of a tensor of both models, as matrices of equal columns.
        source: the base.
        target: the fine-tune.
        method: blockwise, without needs.
        sink: where parts go.
        known: digests of the base's tensor and of the fine-tune's that need not be hashed.
        quantization: of the base that the difference is taken to; None for the base as it is.

    Raises:
        DeltafoldError: `not-finite`, `not-lossless`, and what reading gives.
    """
    with Scratch() as memory:
        return _Tensor(name, source, target, method, sink, known, quantization, memory).code()


@dataclass
class _Sums:
    """Numbers of a tensor, added up block by block."""

    entries: int = 0
    totals: Totals = field(default_factory=Totals)
    missed: float = 0.0

    def add(self, other: _Sums) -> None:
        """Count what was counted of other rows."""
        ours, theirs = self.totals, other.totals
        self.entries += other.entries
        self.missed += other.missed
        self.totals = Totals(
            ours.magnitude + theirs.magnitude,
            ours.square + theirs.square,
            max(ours.largest, theirs.largest),
            ours.changed + theirs.changed,
            ours.base_square + theirs.base_square,
        )

    def stats(self) -> TensorStats:
        """The numbers as the table of tensors has them."""
        count, found = max(self.entries, 1), self.totals
        error = math.sqrt(self.missed / found.square) if found.square > 0 else 0.0
        weights = found.base_square
        return TensorStats(
            mean_abs=found.magnitude / count,
            max_abs=found.largest,
            relative=math.sqrt(found.square / weights) if weights > 0 else 0.0,
            error=error if math.isfinite(error) else 0.0,
            changed=found.changed / count,
        )


@dataclass
class _Block:
    """A coded block: its terms, where their parts are, and its numbers."""

    terms: list[Term]
    places: list[dict[str, Place]]
    sums: _Sums


@dataclass
class _Tensor:
    """One tensor on its way; fields as `code_in_blocks` has them."""

    name: str
    source: NamedBase
    target: Checkpoint
    method: Method
    sink: Sink
    known: tuple[str | None, str | None]
    quantization: Quantization | None
    memory: Scratch

    def __post_init__(self) -> None:
        self.spec, self.base_spec = self.target.spec(self.name), self.source.spec(self.name)
        self.rows, self.columns = rows_and_columns(self.spec.shape)
        self.base_rows = rows_and_columns(self.base_spec.shape)[0]
        self.cut = block_rows(self.spec.shape)
        self.step = self.cut or max(self.rows, 1)
        self.added = max(self.rows - self.base_rows, 0)
        self.leaves_rows_out = rows_count(self.spec.shape)

    def code(self) -> Coded:
        """Hash the tensor and code what changed of it."""
        base, variant, changed, done = self._read_once()
        if self.spec == self.base_spec and not bool(changed.any()):
            return Coded(base, variant, [], [], None)
        if self.leaves_rows_out and (self.added or self._is_few(changed)):
            terms, places, sums = self._code_rows(changed)
        else:
            terms, places, sums = self._code_all(done)
        return Coded(base, variant, terms, places, sums.stats())

    def _read_once(self) -> tuple[str, str, torch.Tensor, list[_Block]]:
        """Digests of both tensors, which rows changed (bool `[N]`), and the blocks coded so far."""
        ours, theirs = (None if digest else hashlib.sha256() for digest in self.known)
        changed = torch.ones(self.rows, dtype=torch.bool)
        likely = not (self.leaves_rows_out and self.added)
        done: list[_Block] = []
        for start, stop in _spans(max(self.rows, self.base_rows), self.step):
            variant, base = self._variant(start, stop, theirs), self._base(start, stop, ours)
            shared = min(len(variant), len(base))
            if shared and self.quantization is None:
                # What a reader takes for an unchanged row is the base's, in the fine-tune's dtype.
                kept = base[:shared].to(variant.dtype)
                changed[start : start + shared] = fast.rows_changed(variant[:shared], kept)
            likely = likely and not self._is_few(changed[:stop])
            if likely and len(variant):
                done.append(self._block(variant, base, len(done) if self.cut else None))
        base_digest, digest = self.known
        return base_digest or _digest(ours), digest or _digest(theirs), changed, done

    def _is_few(self, changed: torch.Tensor) -> bool:
        """Whether so many rows are unchanged that an index of the others pays (4 bytes a row)."""
        return self.rows == self.base_rows and int(changed.sum()) < _MOST * len(changed)

    def _variant(self, start: int, stop: int, total: Hash | None = None) -> torch.Tensor:
        """Rows of the fine-tune, in memory that the next reading of it takes again."""
        return self._read(self.target, "variant", start, min(stop, self.rows), total)

    def _base(self, start: int, stop: int, total: Hash | None = None) -> torch.Tensor:
        """The same of the base, where it may have fewer."""
        return self._read(self.source, "base", start, min(stop, self.base_rows), total)

    def _read(
        self, model: Checkpoint | NamedBase, memory: str, start: int, stop: int, total: Hash | None
    ) -> torch.Tensor:
        itemsize = dtypes.TORCH[model.spec(self.name).dtype].itemsize
        size = max(stop - start, 0) * self.columns * itemsize
        lent = self.memory.lend(memory, (size,), torch.uint8)
        return model.matrix_rows(self.name, start, stop, lent, total)

    def _code_all(self, done: list[_Block]) -> tuple[list[Term], list[dict[str, Place]], _Sums]:
        """All rows; the first blocks may have been coded already."""
        for start, stop in _spans(self.rows, self.step)[len(done) :]:
            variant, base = self._variant(start, stop), self._base(start, stop)
            done.append(self._block(variant, base, len(done) if self.cut else None))
        return self._joined(done, self.cut)

    def _code_rows(self, changed: torch.Tensor) -> tuple[list[Term], list[dict[str, Place]], _Sums]:
        """The changed rows as a smaller matrix, and the added ones as they are."""
        shared = self.rows - self.added
        index = changed[:shared].nonzero().reshape(-1)
        cut = block_rows((len(index), self.columns))
        spans = _spans(len(index), cut or len(index)) or [(0, 0)]
        blocks = [
            self._block(*self._gathered(index[a:b]), number if cut else None)
            for number, (a, b) in enumerate(spans)
        ]
        terms, inner_places, sums = self._joined(blocks, cut)
        rows: list[Term] = []
        places: list[dict[str, Place]] = []
        for number, (inner, kept) in enumerate(zip(terms, inner_places, strict=True)):
            own = {"index": self.sink(index.to(torch.int32))}
            own |= {f"inner.{key}": place for key, place in kept.items()}
            extra = 0 if number else self.added
            if extra:
                own["added"] = self.sink(self.target.matrix_rows(self.name, shared, self.rows))
            rows.append(Rows(inner=inner, count=len(index), added=extra, dtype=self.spec.dtype))
            places.append(own)
        return rows, places, sums

    def _gathered(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows anywhere in both tensors: neighbours are read together."""
        runs = _runs(index) if len(index) else [(0, 0)]
        pieces = [(self._variant(a, b).clone(), self._base(a, b).clone()) for a, b in runs]
        return torch.cat([v for v, _ in pieces]), torch.cat([b for _, b in pieces])

    def _joined(
        self, blocks: list[_Block], cut: int
    ) -> tuple[list[Term], list[dict[str, Place]], _Sums]:
        """Blocks as terms of the whole; a matrix that is not cut is no `blocks` term."""
        sums = _Sums()
        for block in blocks:
            sums.add(block.sums)
        if not cut:
            return blocks[0].terms, blocks[0].places, sums
        terms: list[Term] = []
        places: list[dict[str, Place]] = []
        for inner in zip(*(block.terms for block in blocks), strict=True):
            same = all(term == inner[0] for term in inner)
            terms.append(Blocks(cut, tuple(inner[:1] if same else inner)))
        for kept in zip(*(block.places for block in blocks), strict=True):
            places.append({f"{n}.{k}": p for n, own in enumerate(kept) for k, p in own.items()})
        return terms, places, sums

    def _block(self, variant: torch.Tensor, base: torch.Tensor, number: int | None) -> _Block:
        """Code some rows, read them back, and keep their parts."""
        if self.quantization is not None:
            base = dequantized(self.name, base, self.quantization.method)
        padded = pad_rows(base, tuple(variant.shape))
        assert padded is not None
        pair, context = Pair.of(variant, padded), Context(self.name, padded, variant)
        if number is not None:
            context = block_context(context, 0, len(variant), number)
        sums = _Sums(variant.numel(), fast.totals(pair))
        if not all(is_exact(t) for t in self.method.plan(tuple(variant.shape), self.spec.dtype)):
            refuse_not_finite(self.name, pair, sums.totals, self.method)
        encoded = self._encoded(pair, context)
        sums.missed = self._missed(encoded, pair, replace(context, variant=None), variant)
        places = [{k: self.sink(p) for k, p in sorted(parts.items())} for _, parts in encoded]
        return _Block([term for term, _ in encoded], places, sums)

    def _encoded(self, pair: Pair, context: Context) -> list[Encoded]:
        if isinstance(self.method, PairMethod):
            return self.method.encode_pair(pair, context)
        lent = self.memory.lend("delta", pair.shape)
        return self.method.encode(fast.difference(*pair, lent), context)

    def _missed(
        self, encoded: list[Encoded], pair: Pair, context: Context, variant: torch.Tensor
    ) -> float:
        """Read a block back: exact ones bit for bit, others to know what is lost."""
        first, parts = encoded[0]
        if len(encoded) == 1 and is_exact(first):
            assert isinstance(first, ExactTerm)
            restored = first.restore(parts, pair.shape, variant.dtype, context)
            if bool(fast.rows_changed(restored, variant).any()):
                raise not_lossless(self.name)
            return 0.0
        missed = -1.0
        if len(encoded) == 1 and isinstance(first, MeasuredTerm):
            missed = first.missed(pair, parts)
        if not fast.is_sure(missed):
            lent = self.memory.lend("missed", pair.shape)
            left = fast.difference(*pair, lent)
            for term, parts in encoded:
                left -= term.decode(parts, pair.shape, context)
            missed = fast.square_sum(left)
        if not math.isfinite(missed):
            raise too_large(self.name)
        return missed


def _digest(total: Hash | None) -> str:
    assert total is not None
    return total.hexdigest()


def _spans(rows: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, rows)) for start in range(0, rows, step)] if rows else []


def _runs(index: torch.Tensor) -> list[tuple[int, int]]:
    """Ascending numbers as runs of neighbours, `[start, stop)`."""
    cuts = ((index[1:] - index[:-1]) != 1).nonzero().reshape(-1) + 1
    edges = [0, *cuts.tolist(), len(index)]
    return [(int(index[a]), int(index[b - 1]) + 1) for a, b in itertools.pairwise(edges)]
