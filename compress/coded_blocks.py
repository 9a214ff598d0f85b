"""Blocks of words as coded bytes and back: in C where this machine can have it, in numpy elsewhere.

Both give the same bytes and the same words, and refuse the same streams. The numpy code is put
together here from `symbols` and `rans`; `rans.c` does the same in a few passes over memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltafold.compress import rans, symbols
from deltafold.compress.native import FLAGS, compiled
from deltafold.compress.scratch import borrowed
from deltafold.compress.symbols import Bytes, Words

_DAMAGE: Final = {
    -1: "too few words",
    -2: "the states do not end where they began",
    -3: "too few low bits",
    -4: "too many low bits",
}


class Block(NamedTuple):
    """A block's coded bytes."""

    states: Bytes
    words: Bytes
    low: Bytes


@dataclass(frozen=True)
class Coding:
    """What all blocks of a tensor have in common.

    Attributes:
        dtype: of the words, by the name that safetensors gives it.
        own: uint8 `[256]`: by low byte of the base's exponent the context, below the table's rows.
        table: frequencies.
    """

    dtype: str
    own: Bytes
    table: rans.Table

    @cached_property
    def tables_for_c(self) -> tuple[Bytes, NDArray[np.uint32]]:
        """For C: by slot the symbol, by key the frequency and where its slots begin."""
        library = _library()
        assert library is not None
        # C looks contexts and slots up without asking again.
        assert self.own.shape == (256,)
        assert int(self.own.max()) < len(self.table.frequencies)
        assert self.table.sound()
        frequencies = np.ascontiguousarray(self.table.frequencies)
        slots = np.empty(len(frequencies) * rans.TOTAL + 3, np.uint8)
        pairs = np.empty(frequencies.size, np.uint32)
        library.coding_tables(_at(frequencies), len(frequencies), _at(slots), _at(pairs))
        return slots, pairs


class _Kind(ctypes.Structure):
    """`Kind` of rans.c."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in ("size", "is_float", "leading", "precision", "mantissa", "exponents")
    )


def count_exponents(base: Words, dtype: str) -> NDArray[np.int64]:
    """How often each low byte of an exponent occurs in a base's words: `[256]`."""
    library = _library()
    if library is None or dtype not in symbols.FLOATS:
        return np.bincount(symbols.contexts(base, dtype), minlength=256)
    base, out = np.ascontiguousarray(base), np.zeros(256, np.int64)
    library.count_exponents(_kind(dtype, base.itemsize, False), _at(base), len(base), _at(out))
    return out


def count(words: Words, base: Words | None, dtype: str, own: Bytes) -> NDArray[np.int64]:
    """How often each symbol occurs in each context.

    Args:
        words: of the fine-tune.
        base: words of the same dtype and number, or None for words that are coded by themselves.
        dtype: of the words.
        own: by exponent the context, see `Coding`.

    Returns:
        int64 `[C, 256]`.
    """
    kinds = int(own.max()) + 1
    library = _library()
    if library is None:
        _, symbol = _numbers(words, base, dtype)
        counts = np.bincount(_keys(symbol, base, dtype, own), minlength=256 * kinds)
        return counts.reshape(kinds, 256)
    assert base is None or len(base) == len(words)
    words, below = np.ascontiguousarray(words), _contiguous(base)
    out = np.zeros((kinds, 256), np.int64)
    if library.count_keys(
        _kind(dtype, words.itemsize, base is None), _at(words), _at(below), len(words),
        _at(np.ascontiguousarray(own)), kinds, _at(out),
    ):  # fmt: skip
        raise MemoryError
    return out


def encode(
    words: Words, base: Words | None, coding: Coding, lanes: int, counts: NDArray[np.int64]
) -> Block:
    """Code a block.

    Args:
        words: of the fine-tune, at least one.
        base: as for `count`.
        coding: its table has a frequency above zero for whatever occurs.
        lanes: 1 to `len(words)`.
        counts: what `count` says of these words.
    """
    library = _library()
    if library is None:
        numbers, symbol = _numbers(words, base, coding.dtype)
        states, moved = rans.encode(
            _keys(symbol, base, coding.dtype, coding.own), coding.table, lanes
        )
        return Block(states, moved, symbols.pack_low(numbers, symbol, leading=base is None))
    assert base is None or len(base) == len(words)
    words, below = np.ascontiguousarray(words), _contiguous(base)
    each = np.ascontiguousarray(counts.sum(axis=0))
    assert int(each.sum()) == len(words)
    low = np.empty(symbols.low_size(each, words.itemsize, leading=base is None), np.uint8)
    states = np.empty(lanes, np.uint32)
    with borrowed(2 * len(words) + 16) as moved, borrowed(words.nbytes) as values:
        found = library.encode_block(
            _kind(coding.dtype, words.itemsize, base is None), _at(words), _at(below), len(words),
            _at(np.ascontiguousarray(coding.own)), _at(coding.tables_for_c[1]), _at(each), lanes,
            _at(states), _at(moved), _at(values), _at(low), len(low),
        )  # fmt: skip
        if found < 0:
            raise RuntimeError("the tensor was changed while it was coded")
        return Block(states.view(np.uint8), moved[: 2 * found].copy(), low)


def decode(block: Block, base: Words | None, coding: Coding, out: Words) -> None:
    """The words behind `encode`'s bytes, for the same base and coding.

    Args:
        block: its states may be of any number above zero.
        base: as for `count`.
        coding: a sound table, every context in it.
        out: words, contiguous, to be filled.

    Raises:
        ValueError: the bytes are not those of so many words.
    """
    library, leading = _library(), base is None
    if library is None:
        out[:] = _decoded(block, base, coding, out)
        return
    assert out.flags.c_contiguous
    assert base is None or len(base) == len(out)
    below = _contiguous(base)
    states = np.array(block.states.view("<u4"), np.uint32)
    stream = block.words.view("<u2")
    if not len(states):
        raise ValueError("there are no states")
    slots, pairs = coding.tables_for_c
    low = np.ascontiguousarray(block.low)
    # Eight words are read at a time, some of them beyond the last.
    padded = 2 * len(stream) + 16
    with borrowed(padded) as words, borrowed(len(out)) as symbol, borrowed(out.nbytes) as values:
        words.view(np.uint16)[: len(stream)] = stream
        found = library.decode_block(
            _kind(coding.dtype, out.itemsize, leading), _at(below), len(out),
            _at(np.ascontiguousarray(coding.own)), _at(slots), _at(pairs), _at(states),
            len(states), _at(words), len(stream), _at(low), len(low), _at(symbol), _at(values),
            _at(out),
        )  # fmt: skip
    if found:
        raise ValueError(_DAMAGE[found])


def _numbers(words: Words, base: Words | None, dtype: str) -> tuple[Words, Bytes]:
    """Numbers and their symbols."""
    if base is None:
        numbers = symbols.rotated(words, dtype)
        return numbers, symbols.split(numbers, leading=True)
    numbers = symbols.difference(words, base, dtype)
    return numbers, symbols.split(numbers, leading=False)


def _keys(symbol: Bytes, base: Words | None, dtype: str, own: Bytes) -> NDArray[np.uint16]:
    if base is None:
        return symbol.astype(np.uint16)
    context = own[symbols.contexts(base, dtype)]
    return context.astype(np.uint16) << np.uint16(8) | symbol


def _decoded(block: Block, base: Words | None, coding: Coding, like: Words) -> Words:
    dtype, leading = coding.dtype, base is None
    context = np.zeros(len(like), np.uint8)
    if base is not None:
        context = coding.own[symbols.contexts(base, dtype)]
    symbol = rans.decode(context, coding.table, block.states, block.words)
    low = symbols.unpack_low(block.low, symbol, like.itemsize, leading=leading)
    numbers = symbols.join(symbol, low, leading=leading)
    if base is None:
        return symbols.undo_rotated(numbers, dtype)
    return symbols.undo_difference(numbers, base, dtype)


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled `rans.c`, or None where this machine cannot have it."""
    library = compiled(Path(__file__).with_name("rans.c"), (*FLAGS, "-mbmi2", "-mlzcnt"))
    if library is None:
        return None
    kind, pointer, integer = ctypes.POINTER(_Kind), ctypes.c_void_p, ctypes.c_int64
    several = [pointer] * 3
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "count_exponents": (None, [kind, pointer, integer, pointer]),
        "count_keys": (ctypes.c_int, [kind, pointer, pointer, integer, pointer, integer, pointer]),
        "coding_tables": (None, [pointer, integer, pointer, pointer]),
        "encode_block": (
            integer,
            [kind, pointer, pointer, integer, *several, integer, *several, pointer, integer],
        ),
        "decode_block": (
            ctypes.c_int,
            [
                kind, pointer, integer, *several, pointer, integer, pointer, integer, pointer,
                integer, *several,
            ],
        ),
    }  # fmt: skip
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _kind(dtype: str, size: int, leading: bool) -> _Kind:
    mantissa, exponent = symbols.FLOATS.get(dtype, (0, 0))
    is_float = dtype in symbols.FLOATS
    mask = min(2**exponent - 1, 255)
    return _Kind(size, is_float, leading, symbols.PRECISION[size], mantissa, mask)


def _contiguous(words: Words | None) -> Words | None:
    return None if words is None else np.ascontiguousarray(words)


def _at(array: NDArray[Any] | None) -> int | None:
    """Where an array begins; its owner must keep it."""
    if array is None:
        return None
    address: int = array.__array_interface__["data"][0]
    return address
