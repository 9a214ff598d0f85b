"""One tensor of a packing run, in blocks of rows where it is large.

What is read is hashed as it passes. A large tensor is read twice: once to hash it and to see which
rows changed, once to code it; the second time it comes from the system's cache, if there is room.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch

from deltafold.compress import dtypes, fast
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.encode import (
    TensorStats,
    check_exact,
    encode_tensor,
    is_blockwise,
    measure,
    refuse_not_finite,
    rows_count,
    settled_value,
)
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import EvidenceSource, check_needs
from deltafold.compress.fingerprint import TensorDigest
from deltafold.compress.journal import Place
from deltafold.compress.manifest import Quantization
from deltafold.compress.methods import Method
from deltafold.compress.naming import NamedBase
from deltafold.compress.quantized import dequantized
from deltafold.compress.recipe import Recipe
from deltafold.compress.repo import pad_rows
from deltafold.compress.shapes import rows_and_columns
from deltafold.compress.terms import (
    Blocks,
    Context,
    Encoded,
    ExactTerm,
    Planes,
    Rows,
    SharedSource,
    Term,
    is_exact,
)
from deltafold.compress.terms.blocks import block_context, block_rows

#: Keeps a part and says where.
Sink: TypeAlias = Callable[[torch.Tensor], Place]
#: Terms that need no encoder, and the float32 delta that they stand for; or None.
Given: TypeAlias = Callable[[str], tuple[list[Encoded], torch.Tensor] | None]


class Coded(NamedTuple):
    """A finished tensor: its terms, the places of their parts, and what is known of it.

    `terms` is empty where the tensor is equal to the base's.
    """

    base: str | None
    variant: str
    terms: list[Term]
    places: list[dict[str, Place]]
    stats: TensorStats | None


@dataclass(frozen=True)
class Coder:
    """Codes tensors of a fine-tune one by one; used by several threads.

    Attributes:
        source: the base.
        target: the fine-tune.
        recipe: which method for which tensor.
        sink: where parts go.
        known: digests of the base's tensors that need not be hashed.
        known_target: the same of the fine-tune's.
        evidence: of a calibration run.
        given: terms that the fine-tune brings itself.
        delta: float32 differences that the fine-tune's tensors are a rounding of, or None.
        quantization: of the base that differences are taken to; None for the base as it is.
        shared: where given terms read what they share with other deltas.
        settled: told what the compressed model holds in place of each tensor, float32; whoever asks
            for it gets tensors in the order in which they are coded, as a whole.
    """

    source: NamedBase
    target: TensorSource
    recipe: Recipe
    sink: Sink
    known: Mapping[str, str]
    known_target: Mapping[str, str] = field(default_factory=dict)
    evidence: EvidenceSource | None = None
    given: Given = lambda name: None
    delta: Callable[[str], torch.Tensor | None] = lambda name: None
    quantization: Quantization | None = None
    shared: SharedSource | None = None
    settled: Callable[[str, torch.Tensor], None] | None = None

    def code(self, name: str) -> Coded:
        """Read, hash and code one tensor.

        Raises:
            DeltafoldError: `not-finite`, `not-lossless`, `needs-calibration`, and what reading gives.
        """
        base, variant = self.known.get(name), self.known_target.get(name)
        if base is not None and base == variant and self._is_left_alone(name):
            return Coded(base, variant, [], [], None)
        return _InBlocks(self, name).code() if self.in_blocks(name) else self._whole(name)

    def _is_left_alone(self, name: str) -> bool:
        """Whether a tensor of equal bytes is equal to the base's.

        A given difference may be too small to survive rounding; it still counts when it is served. A
        quantised tensor differs from its own original.
        """
        given = self.given(name) is not None or self.delta(name) is not None
        same = self.source.spec(name) == self.target.spec(name)
        return same and not given and not self.is_quantised(name)

    def in_blocks(self, name: str) -> bool:
        """Whether a tensor is large, and read and coded in blocks."""
        if not isinstance(self.target, Checkpoint) or name not in self.source or self.settled:
            return False
        spec, base = self.target.spec(name), self.source.spec(name)
        if not block_rows(spec.shape) or len(base.shape) != len(spec.shape):
            return False
        # Of a stack of matrices that grew or shrank, rows of the matrix are not rows of the tensor.
        return is_blockwise(self.method(name)) and (len(spec.shape) == 2 or base == spec)

    def method(self, name: str) -> Method:
        """The recipe's method for a tensor."""
        spec = self.target.spec(name)
        return self.recipe.method_for(name, spec.shape, floating=spec.dtype in dtypes.FLOATS)

    def is_quantised(self, name: str) -> bool:
        """Whether a difference is taken to what the base holds once it is quantised."""
        return self.quantization is not None and name in self.quantization.tensors

    def as_served(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """Rows of a base's tensor as the differences are taken to."""
        if not self.is_quantised(name):
            return base
        assert self.quantization is not None
        return dequantized(name, base, self.quantization.method)

    def _whole(self, name: str) -> Coded:
        source, given, known = self.source, self.given(name), self.delta(name)
        value = self.target.tensor(name)
        base = source.tensor(name) if name in source else None
        digest = self.known_target.get(name) or dtypes.sha256(value)
        base_digest = None if base is None else self.known.get(name) or dtypes.sha256(base)
        same = base is not None and (base.dtype, base.shape) == (value.dtype, value.shape)
        differs = given is not None or known is not None or self.is_quantised(name)
        if same and not differs and base_digest == digest:
            return Coded(base_digest, digest, [], [], None)
        if base is not None:
            base = self.as_served(name, base)
        encoded, delta = given or encode_tensor(
            name, value, base, self.recipe, self.evidence, known
        )
        check_exact(name, encoded, value, base, TensorDigest(*self.target.spec(name), digest))
        if self.settled is not None:
            self.settled(name, settled_value(name, encoded, value, base))
        stats = measure(name, encoded, delta, base, self.shared)
        places = [{k: self.sink(part) for k, part in sorted(e.parts.items())} for e in encoded]
        return Coded(base_digest, digest, [e.term for e in encoded], places, stats)


@dataclass
class _Sums:
    """Numbers of a tensor, added up block by block."""

    entries: int = 0
    magnitude: float = 0.0
    square: float = 0.0
    rest: float = 0.0
    weights: float = 0.0
    largest: float = 0.0
    changed: int = 0

    def add(self, delta: torch.Tensor, missed: float, base: torch.Tensor) -> None:
        """Count one block: its difference, the squares that its terms miss, the base's weights."""
        found = fast.totals(delta)
        self.entries += delta.numel()
        self.magnitude += found.magnitude
        self.square += found.square
        self.rest += missed
        self.largest = max(self.largest, found.largest)
        self.changed += found.changed
        if base.is_floating_point():
            self.weights += fast.square_sum(base)

    def stats(self) -> TensorStats:
        """The numbers as the table of tensors has them."""
        count = max(self.entries, 1)
        error = math.sqrt(self.rest / self.square) if self.square > 0 else 0.0
        return TensorStats(
            mean_abs=self.magnitude / count,
            max_abs=self.largest,
            relative=math.sqrt(self.square / self.weights) if self.weights > 0 else 0.0,
            error=error if math.isfinite(error) else 0.0,
            changed=self.changed / count,
        )


class _Pair(NamedTuple):
    """Some rows of both models: the fine-tune's, and the base's padded with zeros to as many."""

    variant: torch.Tensor
    base: torch.Tensor


class _InBlocks:
    """One large tensor."""

    def __init__(self, coder: Coder, name: str) -> None:
        assert isinstance(coder.target, Checkpoint)
        self._coder, self._name = coder, name
        self._source, self._target = coder.source, coder.target
        self._spec = coder.target.spec(name)
        self._rows, self._columns = rows_and_columns(self._spec.shape)
        self._base_rows = rows_and_columns(coder.source.spec(name).shape)[0]
        self._step = block_rows(self._spec.shape)
        self._sums = _Sums()

    def code(self) -> Coded:
        """Hash the tensor, then code what changed of it."""
        base, variant, changed = self._scan()
        same = self._source.spec(self._name) == self._spec
        if same and not bool(changed.any()):
            return Coded(base, variant, [], [], None)
        method = self._coder.method(self._name)
        added = max(self._rows - self._base_rows, 0)
        few = self._rows == self._base_rows and int(changed.sum()) < 0.9 * self._rows
        if rows_count(self._spec.shape) and (added or few):
            terms, places = self._code_rows(method, changed, added)
        else:
            terms, places = self._code_all(method)
        return Coded(base, variant, terms, places, self._sums.stats())

    def _scan(self) -> tuple[str | None, str, torch.Tensor]:
        """Digests of both tensors, and which rows changed (bool `[N]`)."""
        ours, theirs = hashlib.sha256(), hashlib.sha256()
        known = self._coder.known.get(self._name)
        known_target = self._coder.known_target.get(self._name)
        changed = torch.ones(self._rows, dtype=torch.bool)
        for start in range(0, max(self._rows, self._base_rows), self._step):
            variant = self._read(self._target, start, self._rows)
            base = self._read(self._source, start, self._base_rows)
            if known_target is None:
                theirs.update(dtypes.raw_bytes(variant).numpy().data)
            if known is None:
                ours.update(dtypes.raw_bytes(base).numpy().data)
            shared = min(len(variant), len(base))
            if variant.dtype == base.dtype and shared and not self._coder.is_quantised(self._name):
                found = fast.rows_changed(variant[:shared], base[:shared])
                changed[start : start + shared] = found
        return known or ours.hexdigest(), known_target or theirs.hexdigest(), changed

    def _read(self, checkpoint: Checkpoint | NamedBase, start: int, rows: int) -> torch.Tensor:
        return self._rows_of(checkpoint, start, max(min(start + self._step, rows), start))

    def _rows_of(self, checkpoint: Checkpoint | NamedBase, start: int, stop: int) -> torch.Tensor:
        """Rows in memory that the next reading of the same checkpoint takes again."""
        whose = "variant" if checkpoint is self._target else "base"
        itemsize = dtypes.TORCH[checkpoint.spec(self._name).dtype].itemsize
        size = (stop - start) * self._columns * itemsize
        lent = fast.scratch(whose, (size,), torch.uint8)
        return checkpoint.matrix_rows(self._name, start, stop, lent)

    def _pair(self, start: int, stop: int) -> _Pair:
        variant = self._rows_of(self._target, start, stop)
        base = self._rows_of(self._source, start, min(stop, max(self._base_rows, start)))
        padded = pad_rows(self._coder.as_served(self._name, base), tuple(variant.shape))
        assert padded is not None
        return _Pair(variant, padded)

    def _gathered(self, index: torch.Tensor) -> _Pair:
        """Rows anywhere in the tensor: neighbours are read together."""
        pieces = [_Pair(*map(torch.clone, self._pair(a, b))) for a, b in _runs(index)]
        return _Pair(torch.cat([p.variant for p in pieces]), torch.cat([p.base for p in pieces]))

    def _code_all(self, method: Method) -> tuple[list[Term], list[dict[str, Place]]]:
        spans = _spans(self._rows, self._step)
        pairs = (self._pair(start, stop) for start, stop in spans)
        return self._code_matrix(method, pairs, self._step)

    def _code_rows(
        self, method: Method, changed: torch.Tensor, added: int
    ) -> tuple[list[Term], list[dict[str, Place]]]:
        shared = self._rows - added
        index = changed[:shared].nonzero().reshape(-1)
        step = block_rows((len(index), self._columns)) or max(len(index), 1)
        pairs: Iterator[_Pair] = (self._gathered(index[a:b]) for a, b in _spans(len(index), step))
        if not len(index):
            pairs = iter([_Pair(*(torch.empty(0, self._columns, dtype=t) for t in self._dtypes()))])
        terms, inner_places = self._code_matrix(method, pairs, step, whole=len(index))
        rows: list[Term] = []
        places: list[dict[str, Place]] = []
        for number, (inner, kept) in enumerate(zip(terms, inner_places, strict=True)):
            own = {"index": self._coder.sink(index.to(torch.int32))}
            own |= {f"inner.{key}": place for key, place in kept.items()}
            extra = 0 if number else added
            if extra:
                tail = self._target.matrix_rows(self._name, shared, self._rows)
                own["added"] = self._coder.sink(tail)
            rows.append(Rows(inner=inner, count=len(index), added=extra, dtype=self._spec.dtype))
            places.append(own)
        return rows, places

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        base = self._source.spec(self._name)
        return dtypes.TORCH[self._spec.dtype], dtypes.TORCH[base.dtype]

    def _code_matrix(
        self, method: Method, pairs: Iterator[_Pair], step: int, whole: int | None = None
    ) -> tuple[list[Term], list[dict[str, Place]]]:
        """Code blocks one after the other; a matrix that fits one block is no `blocks` term."""
        single = whole is not None and whole <= step
        terms: list[list[Term]] = []
        places: list[dict[str, Place]] = []
        for number, pair in enumerate(pairs):
            encoded = self._block(method, pair, None if single else number)
            if not terms:
                terms, places = [[] for _ in encoded], [{} for _ in encoded]
            prefix = "" if single else f"{number}."
            for own, kept, (term, parts) in zip(terms, places, encoded, strict=True):
                own.append(term)
                kept |= {f"{prefix}{k}": self._coder.sink(p) for k, p in sorted(parts.items())}
        if single:
            return [own[0] for own in terms], places
        return [Blocks(step, tuple(own[:1] if _all_equal(own) else own)) for own in terms], places

    def _block(self, method: Method, pair: _Pair, number: int | None) -> list[Encoded]:
        lent = fast.scratch("delta", tuple(pair.variant.shape))
        delta = fast.difference(pair.variant, pair.base, lent)
        context = Context(self._name, pair.base, pair.variant)
        if method.needs:
            check_needs(method.needs, self._coder.evidence, method.id)
        if number is not None:
            context = block_context(context, 0, len(delta), number)
        shape = tuple(delta.shape)
        if not all(is_exact(term) for term in method.plan(shape, self._spec.dtype)):
            refuse_not_finite(self._name, delta, method)
        encoded = method.encode(delta, context)
        self._check(encoded, pair, delta, replace(context, variant=None))
        return encoded

    def _check(
        self, encoded: list[Encoded], pair: _Pair, delta: torch.Tensor, context: Context
    ) -> None:
        """Read a block back: exact ones bit for bit, others to know what is lost."""
        shape = tuple(pair.variant.shape)
        if len(encoded) == 1 and is_exact(encoded[0].term):
            term, parts = encoded[0]
            assert isinstance(term, ExactTerm)
            restored = term.restore(parts, shape, pair.variant.dtype, context)
            if bool(fast.rows_changed(restored, pair.variant).any()):
                raise DeltafoldError(
                    "not-lossless",
                    f"{self._name} would not come back bit for bit.",
                    fix="pack again; if no file changed during the run, this is a bug",
                )
            self._sums.add(delta, 0.0, pair.base)
            return
        self._sums.add(delta, _squares_missed(delta, encoded, context), pair.base)
        if not math.isfinite(self._sums.rest):
            raise DeltafoldError(
                "not-finite",
                f"{self._name} has entries that are too large for its codec.",
                fix="check the fine-tune, or keep this tensor as it is: "
                f"--set '{self._name}=lossless'",
            )


def _squares_missed(delta: torch.Tensor, encoded: list[Encoded], context: Context) -> float:
    if len(encoded) == 1 and isinstance(encoded[0].term, Planes):
        return encoded[0].term.squared_error(delta, encoded[0].parts)
    missed = fast.scratch("missed", tuple(delta.shape)).copy_(delta)
    for term, parts in encoded:
        missed -= term.decode(parts, tuple(delta.shape), context)
    return fast.square_sum(missed)


def _spans(rows: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _runs(index: torch.Tensor) -> list[tuple[int, int]]:
    """Ascending numbers as runs of neighbours, `[start, stop)`."""
    cuts = ((index[1:] - index[:-1]) != 1).nonzero().reshape(-1) + 1
    edges = [0, *cuts.tolist(), len(index)]
    return [(int(index[a]), int(index[b - 1]) + 1) for a, b in itertools.pairwise(edges)]


def _all_equal(terms: list[Any]) -> bool:
    return all(term == terms[0] for term in terms)
