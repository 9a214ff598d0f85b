"""Range coding of small symbols under many contexts, many at a time: interleaved rANS in numpy.

Asymmetric numeral systems (Duda, arXiv 1311.2540) in the range form with 16-bit words: a state is a
32-bit number of at least 2^16, and a symbol moves at most one word. Symbol `i` of `n` belongs to lane
`i mod L` of L lanes, each with a state of its own, so that one step codes L symbols with a handful of
array operations. All arithmetic is on whole numbers: every machine writes and reads the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: Frequencies of a context add up to `2 ** SCALE_BITS`.
SCALE_BITS: Final = 13
TOTAL: Final = 1 << SCALE_BITS
SYMBOLS: Final = 256
_LOW: Final = np.uint32(1 << 16)
_SCALE: Final = np.uint32(SCALE_BITS)

Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Table:
    """Frequencies, uint16 `[C, 256]`; each row adds up to `TOTAL`, or is all zero and never used."""

    frequencies: NDArray[np.uint16]

    @cached_property
    def flat(self) -> NDArray[np.uint32]:
        """By `context << 8 | symbol`: the frequency."""
        return self.frequencies.astype(np.uint32).reshape(-1)

    @cached_property
    def starts(self) -> NDArray[np.uint32]:
        """By `context << 8 | symbol`: the sum of the frequencies of all smaller symbols."""
        sums = np.cumsum(self.frequencies, axis=1, dtype=np.uint32) - self.frequencies
        return sums.astype(np.uint32).reshape(-1)

    @cached_property
    def symbols(self) -> Bytes:
        """By `context << SCALE_BITS | slot`: the symbol."""
        out = np.zeros((len(self.frequencies), TOTAL), np.uint8)
        every = np.arange(SYMBOLS, dtype=np.uint8)
        for row, frequencies in zip(out, self.frequencies, strict=True):
            if frequencies.any():
                row[:] = np.repeat(every, frequencies)
        return out.reshape(-1)

    def sound(self) -> bool:
        """Whether rows add up as they must."""
        sums = self.frequencies.sum(axis=1, dtype=np.int64)
        return bool(((sums == TOTAL) | (sums == 0)).all())


def table_for(counts: NDArray[np.int64]) -> Table:
    """Frequencies for counts `[C, 256]`: in proportion, at least 1 where a symbol occurs."""
    frequencies = np.zeros(counts.shape, np.uint16)
    for row, count in zip(frequencies, counts, strict=True):
        total = int(count.sum())
        if total:
            row[:] = _scaled(count, total)
    return Table(frequencies)


def _scaled(count: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    scaled = np.maximum(count * TOTAL // total, (count > 0).astype(np.int64))
    # What rounding lost goes to the commonest symbol; what the least share of 1 took too much comes
    # from the commonest ones, one after the other.
    while (rest := TOTAL - int(scaled.sum())) != 0:
        top = int(np.argmax(scaled))
        scaled[top] += rest if rest > 0 else -min(-rest, int(scaled[top]) // 2)
    return scaled


def bits_of(counts: NDArray[np.int64]) -> float:
    """What counts `[C, 256]` cost in bits, by their entropy."""
    total = counts.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.where(counts > 0, counts * np.log2(total / np.maximum(counts, 1)), 0.0)
    return float(each.sum())


def encode(keys: NDArray[np.uint16], table: Table, lanes: int) -> tuple[Bytes, Bytes]:
    """Code symbols.

    Args:
        keys: `context << 8 | symbol`, at least one; no context has more than its row of the table.
        table: frequencies, above zero for every key.
        lanes: 1 to `len(keys)`.

    Returns:
        The lanes' last states (uint32) and the words (uint16), both as little-endian bytes.
    """
    states = np.full(lanes, _LOW, np.uint32)
    words: list[NDArray[np.uint16]] = []
    limit = np.uint32(32 - SCALE_BITS)
    for start in reversed(range(0, len(keys), lanes)):
        key = keys[start : start + lanes]
        frequency = table.flat[key]
        state = states[: len(key)]
        full = np.flatnonzero((state >> limit) >= frequency)
        moved = state[full]
        words.append(moved.astype(np.uint16))
        state[full] = moved >> np.uint32(16)
        # Exact: a quotient of such numbers is never so close below a whole one that it rounds up.
        quotient = (state / frequency).astype(np.int64).astype(np.uint32)
        state += quotient * (np.uint32(TOTAL) - frequency) + table.starts[key]
    return _raw(states), _raw(np.concatenate(words[::-1]))


def decode(contexts: Bytes, table: Table, states: Bytes, words: Bytes) -> Bytes:
    """The symbols behind `encode`'s output, for the same contexts.

    Raises:
        ValueError: the bytes are not those of so many symbols.
    """
    state_of = states.view("<u4").astype(np.uint32)
    stream = words.view("<u2").astype(np.uint32)
    lanes, at = len(state_of), 0
    out = np.empty(len(contexts), np.uint8)
    mask, sixteen = np.uint32(TOTAL - 1), np.uint32(16)
    for start in range(0, len(contexts), lanes):
        context = contexts[start : start + lanes].astype(np.uint32)
        state = state_of[: len(context)]
        slot = state & mask
        symbol = table.symbols[context << _SCALE | slot]
        out[start : start + lanes] = symbol
        key = context << np.uint32(8) | symbol
        state[:] = table.flat[key] * (state >> _SCALE) + slot - table.starts[key]
        low = np.flatnonzero(state < _LOW)
        if at + len(low) > len(stream):
            raise ValueError("too few words")
        state[low] = state[low] << sixteen | stream[at : at + len(low)]
        at += len(low)
    if at != len(stream) or bool((state_of != _LOW).any()):
        raise ValueError("the states do not end where they began")
    return out


def _raw(array: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).view(np.uint8)
