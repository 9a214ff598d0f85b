"""Bit-exact and small: differences to the base, coded under the base's exponents.

A step of training moves weights by amounts that have little to do with their size, but a word's last
bit is worth the more the larger its exponent is. So how far the fine-tune's word lies from the base's,
counted in words, is predicted by the base's exponent, which a reader has. Each exponent has
frequencies of its own, and the differences are coded close to their entropy (`rans`). Low bits of
large differences are as good as random and kept as they are (`symbols`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from deltafold.compress import coded_blocks, dtypes, rans, symbols
from deltafold.compress.coded_blocks import Block, Coding
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.terms.base import Checked, Context, Encoded, Parts, PartSpec, register

Item = TypeVar("Item")
Result = TypeVar("Result")
Mode: TypeAlias = Literal["difference", "raw", "plain"]

#: A context of its own costs a table; fewer words than this do not earn it back.
_OWN_CONTEXT: Final = 4096
_MOST_CONTEXTS: Final = 32
#: Symbols a lane: more make states cheaper, fewer make steps wider.
_DEPTHS: Final = ((2**18, 1024), (0, 256))


@register
@dataclass(frozen=True)
class Lossless(Checked):
    """Coded differences.

    Parts, all uint8: `tables`, `states`, `words` and `low`, see `docs/format.md`.

    Attributes:
        dtype: the fine-tune's dtype, filled in by encode, as is all that follows but `block`.
        mode: "difference" to the base; "raw" where there is no base of that dtype and shape, or
            where it is no help; "plain" where coding does not pay.
        block: elements of a block; blocks can be read one by one.
        depth: symbols of a lane.
        tables: bytes of the tables.
        words: bytes of each block's words; empty until encoded.
        low: bytes of each block's low bits.
    """

    id: ClassVar[str] = "lossless"
    version: ClassVar[int] = 2

    dtype: str = "BF16"
    mode: str = "plain"
    block: int = 2**22
    depth: int = 256
    tables: int = 0
    words: tuple[int, ...] = ()
    low: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._require(self.dtype in dtypes.TORCH, f"unknown dtype {self.dtype!r}")
        self._require(self.mode in ("difference", "raw", "plain"), f"unknown mode {self.mode!r}")
        self._require(1 <= self.block < 2**31, "block must be 1 to 2**31")
        self._require(1 <= self.depth < 2**31, "depth must be 1 to 2**31")
        sizes = (self.tables, *self.words, *self.low)
        self._require(all(type(n) is int and n >= 0 for n in sizes), "sizes are whole numbers")
        self._require(len(self.words) == len(self.low), "words and low must be one a block")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Takes `context.variant` and `context.base`; the delta itself is not looked at."""
        variant = context.variant
        assert variant is not None
        dtype = dtypes.NAMES[variant.dtype]
        own = _words(variant)
        below = context.base
        base = _words(below) if below is not None and _fits(below, variant) else None
        depth = next(depth for least, depth in _DEPTHS if len(own) >= least)
        start = replace(self, dtype=dtype, depth=depth)
        best = _best_plan(start, own, base) if len(own) else None
        if best is None or best.bits / 8 + _overhead(start, len(own)) >= own.nbytes:
            return start._plain(own)
        return best.coded(own, base)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """Value minus base, float32."""
        value = self.restore(parts, shape, dtypes.TORCH[self.dtype], context).to(torch.float32)
        return value if context.base is None else value - context.base.to(torch.float32)

    def restore(
        self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, context: Context
    ) -> torch.Tensor:
        """The fine-tune's tensor, bit for bit. Raises `checksum` where the parts do not fit."""
        own = dtypes.TORCH[self.dtype]
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=own)
        if self.mode == "plain":
            return torch.from_numpy(parts["low"].numpy().copy()).view(own).reshape(shape)
        base = None
        if self.mode == "difference":
            expected = torch.empty(shape, dtype=own, device="meta")
            if not _fits(context.base, expected):
                raise DeltafoldError(
                    "base-mismatch",
                    f"{context.name}: the base's tensor has another shape or dtype.",
                )
            assert context.base is not None
            base = _words(context.base)
        try:
            out = self._decoded(parts, count, base)
        except (ValueError, zstandard.ZstdError) as error:
            raise DeltafoldError("checksum", f"{context.name} is damaged: {error}.") from error
        return torch.from_numpy(out.view(np.uint8)).view(own).reshape(shape)

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part; before encoding the size of the raw tensor is promised."""
        count = math.prod(shape)
        size = dtypes.TORCH[self.dtype].itemsize
        plain = self.mode == "plain"
        whole, rest = divmod(count, self.block)
        states = 0 if plain else 4 * (whole * self.lanes(self.block) + self.lanes(rest))
        sizes = {
            "tables": self.tables,
            "states": states,
            "words": sum(self.words),
            "low": count * size if plain else sum(self.low),
        }
        return {key: PartSpec(torch.uint8, (n,)) for key, n in sizes.items()}

    def lanes(self, count: int) -> int:
        """Lanes of a block of so many elements."""
        return -(-count // self.depth)

    def _plain(self, words: NDArray[Any]) -> Encoded:
        empty = {key: _part([]) for key in ("tables", "states", "words")}
        term = replace(self, mode="plain", tables=0, words=(), low=())
        return Encoded(term, {**empty, "low": _part([words.view(np.uint8)])})

    def _decoded(self, parts: Parts, count: int, base: NDArray[Any] | None) -> NDArray[Any]:
        size = dtypes.TORCH[self.dtype].itemsize
        # Asked before anything is made of a size, which a forged manifest can choose.
        if -(-count // self.block) != len(self.words):
            raise ValueError("the blocks are not as many as the tensor has")
        sizes = _block_sizes(count, self.block)
        own, table = _read_tables(parts["tables"].numpy())
        coding = Coding(self.dtype, own, table)
        out = np.empty(count, symbols.WORDS[size])
        states, words = parts["states"].numpy(), parts["words"].numpy()
        low = parts["low"].numpy()
        ends = [np.cumsum([0, *ns]) for ns in (sizes, self.words, self.low)]
        lanes = np.cumsum([0, *(4 * self.lanes(n) for n in sizes)])

        def block(i: int) -> None:
            place = slice(ends[0][i], ends[0][i + 1])
            read = Block(
                states[lanes[i] : lanes[i + 1]],
                words[ends[1][i] : ends[1][i + 1]],
                low[ends[2][i] : ends[2][i + 1]],
            )
            coded_blocks.decode(read, None if base is None else base[place], coding, out[place])

        _each(block, range(len(sizes)))
        return out


class _Plan(NamedTuple):
    """One way to code a tensor, its frequencies counted.

    Attributes:
        term: with dtype and mode.
        own: by low byte of the base's exponent: the context.
        counts: `[C, 256]`, block by block.
        bits: by the entropy, low bits included.
    """

    term: Lossless
    own: symbols.Bytes
    counts: list[NDArray[np.int64]]
    bits: float

    def coded(self, words: NDArray[Any], base: NDArray[Any] | None) -> Encoded:
        """Write it."""
        term, table = self.term, rans.table_for(np.sum(self.counts, axis=0))
        coding = Coding(term.dtype, self.own, table)
        base = base if term.mode == "difference" else None

        def block(i: int) -> Block:
            place = slice(i * term.block, (i + 1) * term.block)
            own, below = words[place], None if base is None else base[place]
            return coded_blocks.encode(own, below, coding, term.lanes(len(own)), self.counts[i])

        blocks = _each(block, range(len(self.counts)))
        tables = _tables(self.own, table)
        parts = {
            "tables": _part([tables]),
            "states": _part([b.states for b in blocks]),
            "words": _part([b.words for b in blocks]),
            "low": _part([b.low for b in blocks]),
        }
        term = replace(
            term,
            tables=len(tables),
            words=tuple(len(b.words) for b in blocks),
            low=tuple(len(b.low) for b in blocks),
        )
        return Encoded(term, parts)


def _best_plan(term: Lossless, words: NDArray[Any], base: NDArray[Any] | None) -> _Plan:
    """The smaller of the two ways to code."""
    if base is None:
        return _plan(term, "raw", words, None)
    near = _plan(term, "difference", words, base)
    # Without a base all bits but the first eight are kept as they are, which is often more already.
    if near.bits <= len(words) * (8 * words.itemsize - 8):
        return near
    return min(near, _plan(term, "raw", words, base), key=lambda plan: plan.bits)


def _plan(term: Lossless, mode: Mode, words: NDArray[Any], base: NDArray[Any] | None) -> _Plan:
    """Count what coding in a mode would take."""
    below = base if mode == "difference" else None
    dtype = term.dtype
    exponents = np.zeros(256, np.int64)
    starts = range(0, len(words), term.block)
    if below is not None:
        found = _each(
            lambda i: coded_blocks.count_exponents(below[i : i + term.block], dtype), starts
        )
        exponents = np.sum(found, axis=0)
    own = _own_contexts(exponents)

    def count(start: int) -> NDArray[np.int64]:
        place = slice(start, start + term.block)
        return coded_blocks.count(words[place], None if below is None else below[place], dtype, own)

    counts = _each(count, starts)
    low = symbols.low_counts(words.itemsize, leading=below is None).astype(np.int64)
    total = np.sum(counts, axis=0)
    bits = rans.bits_of(total) + int((total @ low).sum())
    return _Plan(replace(term, mode=mode), own, counts, bits)


def _own_contexts(exponents: NDArray[np.int64]) -> symbols.Bytes:
    """By exponent: its context; 0 is for all that are too rare for one of their own."""
    own = np.zeros(256, np.uint8)
    commonest = np.argsort(-exponents, kind="stable")[: _MOST_CONTEXTS - 1]
    chosen = sorted(int(e) for e in commonest if exponents[e] >= _OWN_CONTEXT)
    own[chosen] = np.arange(1, len(chosen) + 1)
    return own


def _tables(own: symbols.Bytes, table: rans.Table) -> symbols.Bytes:
    frequencies = table.frequencies.reshape(-1)
    halves = [(frequencies & np.uint16(255)), (frequencies >> np.uint16(8))]
    raw = np.concatenate([own, *(half.astype(np.uint8) for half in halves)])
    return np.frombuffer(zstandard.ZstdCompressor(level=9).compress(raw.tobytes()), np.uint8)


def _read_tables(packed: NDArray[np.uint8]) -> tuple[symbols.Bytes, rans.Table]:
    """By exponent the context, and the frequencies. Raises `ValueError` where they make no sense."""
    data = packed.tobytes()
    # Asked before inflating, since a small frame may claim to be a huge one.
    size = zstandard.frame_content_size(data)
    kinds, rest = divmod(size - 256, 512)
    if rest or not 1 <= kinds <= 256:
        raise ValueError("the tables have no sound size")
    raw = np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint8)
    own, low, high = raw[:256], raw[256 : 256 + 256 * kinds], raw[256 + 256 * kinds :]
    frequencies = low.astype(np.uint16) | high.astype(np.uint16) << np.uint16(8)
    table = rans.Table(frequencies.reshape(kinds, 256))
    if not table.sound() or int(own.max()) >= kinds:
        raise ValueError("the tables do not add up")
    return own, table


def _each(do: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`do` for every item, on as many threads as there are cores; results in order."""
    work = list(items)
    # Asking for the number of cores is a system call, which a tensor of one block can do without.
    threads = min(len(work), os.cpu_count() or 1) if len(work) > 1 else 1
    if threads < 2:
        return [do(item) for item in work]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(do, work))


def _block_sizes(count: int, block: int) -> list[int]:
    return [min(block, count - start) for start in range(0, count, block)]


def _overhead(term: Lossless, count: int) -> int:
    """Bytes besides the coded bits, about: states, and a table that is nearly empty."""
    return 4 * term.lanes(count) + 64


def _part(pieces: list[Any]) -> torch.Tensor:
    joined = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
    return torch.from_numpy(joined.astype(np.uint8, copy=True))


def _fits(base: torch.Tensor | None, variant: torch.Tensor) -> bool:
    return base is not None and base.dtype == variant.dtype and base.shape == variant.shape


def _words(tensor: torch.Tensor) -> NDArray[Any]:
    raw = dtypes.raw_bytes(tensor).numpy()
    return raw.view(symbols.WORDS[tensor.dtype.itemsize])
