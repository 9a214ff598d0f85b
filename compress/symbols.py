"""Words of a tensor as symbols to be coded and low bits to be kept as they are.

The difference of two floating-point words is taken between their places in the order of all numbers
of the dtype, and folded so that small differences of either sign become small numbers (0, -1, 1, -2,
...: 0, 1, 2, 3, ...). Such a number `z` is split as a histogram with logarithmic classes would do it:
its leading `p + 1` bits and its length are the symbol, `k` low bits are kept. In FM-Delta (Ning et al.,
NeurIPS 2024) the symbol is the length alone; here the next `p` bits are coded as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[Any]
Bytes: TypeAlias = NDArray[np.uint8]

WORDS: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: Final = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
#: By bytes of a word: `p`, such that there are at most 256 symbols.
PRECISION: Final = {1: 7, 2: 4, 4: 3, 8: 2}
#: Bits of mantissa and of exponent.
FLOATS: Final = {
    "F64": (52, 11),
    "F32": (23, 8),
    "F16": (10, 5),
    "BF16": (7, 8),
    "F8_E4M3": (3, 4),
    "F8_E5M2": (2, 5),
}


def contexts(words: Words, dtype: str) -> Bytes:
    """What the base tells of how large differences are: the low 8 bits of its exponents."""
    if dtype not in FLOATS:
        return np.zeros(len(words), np.uint8)
    mantissa, exponent = FLOATS[dtype]
    kind = words.dtype.type
    out: Bytes = (words >> kind(mantissa) & kind(min(2**exponent - 1, 255))).astype(np.uint8)
    return out


def difference(variant: Words, base: Words, dtype: str) -> Words:
    """The folded difference of words."""
    size, kind = variant.itemsize, variant.dtype.type
    step = (_ordered(variant, dtype) - _ordered(base, dtype)).view(_SIGNED[size])
    sign = (step >> (8 * size - 1)).view(variant.dtype)
    found: Words = (step.view(variant.dtype) << kind(1)) ^ sign
    return found


def undo_difference(folded: Words, base: Words, dtype: str) -> Words:
    """The words behind `difference`."""
    kind = folded.dtype.type
    step = (folded >> kind(1)) ^ (kind(0) - (folded & kind(1)))
    return _unordered(step + _ordered(base, dtype), dtype)


def rotated(words: Words, dtype: str) -> Words:
    """Words without a base: of a float, the sign moved behind the mantissa."""
    kind = words.dtype.type
    if dtype not in FLOATS:
        return words
    found: Words = (words << kind(1)) | (words >> kind(8 * words.itemsize - 1))
    return found


def undo_rotated(words: Words, dtype: str) -> Words:
    """The words behind `rotated`."""
    kind = words.dtype.type
    if dtype not in FLOATS:
        return words
    found: Words = (words >> kind(1)) | (words << kind(8 * words.itemsize - 1))
    return found


def split(numbers: Words, *, leading: bool) -> Bytes:
    """The symbols of numbers.

    Args:
        numbers: folded differences, or with `leading` rotated words, whose first byte is the symbol.
        leading: which of the two.
    """
    size, symbols = numbers.itemsize, np.empty(0, np.uint8)
    if leading:
        symbols = (numbers >> numbers.dtype.type(8 * size - 8)).astype(np.uint8)
    elif size <= 2:
        symbols = _small_table(size)[numbers]
    else:
        left = np.maximum(_lengths(numbers) - (PRECISION[size] + 1), 0).astype(np.uint8)
        top = (numbers >> left.astype(numbers.dtype)).astype(np.uint8)
        symbols = (left << np.uint8(PRECISION[size])) + top
    return symbols


@lru_cache(maxsize=8)
def low_counts(size: int, *, leading: bool) -> Bytes:
    """By symbol: how many low bits it leaves of a word of `size` bytes."""
    if leading:
        return np.full(256, 8 * size - 8, np.uint8)
    most = 8 * size - (PRECISION[size] + 1)
    out: Bytes = np.clip((np.arange(256) >> PRECISION[size]) - 1, 0, most).astype(np.uint8)
    return out


def low_size(counts: NDArray[np.int64], size: int, *, leading: bool) -> int:
    """How many bytes `pack_low` makes of words whose symbols occur so often: `counts` `[256]`."""
    many = np.bincount(low_counts(size, leading=leading), counts, 8 * size).astype(np.int64)
    some = [(int(k), int(many[k])) for k in np.flatnonzero(many)]
    return sum(-(-n * width // 8) for k, n in some for width in _widths(k))


def pack_low(numbers: Words, symbols: Bytes, *, leading: bool) -> Bytes:
    """The low bits of all numbers: by how many there are, then whole bytes, then 4, 2 and 1 bits."""
    out: list[Bytes] = []
    kind = numbers.dtype.type
    for count, places in _by_count(symbols, numbers.itemsize, leading=leading):
        value = numbers[places]
        for width in _widths(count):
            codes = value.astype(np.uint8)
            if width == 8:
                out.append(codes)
                value = value >> kind(8)
            else:
                out.append(_packed(codes & np.uint8(2**width - 1), width))
                value = value >> kind(width)
    return np.concatenate(out) if out else np.empty(0, np.uint8)


def unpack_low(packed: Bytes, symbols: Bytes, size: int, *, leading: bool) -> Words:
    """The low bits behind `pack_low`. Raises `ValueError` where `packed` has another length."""
    word = WORDS[size]
    low, at = np.zeros(len(symbols), word), 0
    for count, places in _by_count(symbols, size, leading=leading):
        value, shift = np.zeros(len(places), word), 0
        for width in _widths(count):
            nbytes = -(-len(places) * width // 8)
            if at + nbytes > len(packed):
                raise ValueError("too few low bits")
            codes = _unpacked(packed[at : at + nbytes], width, len(places))
            value |= codes.astype(word) << word(shift)
            at, shift = at + nbytes, shift + width
        low[places] = value
    if at != len(packed):
        raise ValueError("too many low bits")
    return low


def join(symbols: Bytes, low: Words, *, leading: bool) -> Words:
    """The numbers behind `split`, given their low bits."""
    return _tops(low.itemsize, leading)[symbols] | low


@lru_cache(maxsize=8)
def _tops(size: int, leading: bool) -> Words:
    """By symbol: the number whose low bits are zero."""
    word = WORDS[size]
    every = np.arange(256, dtype=np.uint8)
    left = low_counts(size, leading=leading)
    top = every if leading else every - (left << np.uint8(PRECISION[size]))
    found: Words = top.astype(word) << left.astype(word)
    return found


def _by_count(
    symbols: Bytes, size: int, *, leading: bool
) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Places of the numbers that leave so many low bits, by ascending count above zero."""
    table = low_counts(size, leading=leading)
    if leading:
        if table[0] and len(symbols):
            yield int(table[0]), np.arange(len(symbols))
        return
    # Most symbols of a narrow dtype leave none.
    some = np.flatnonzero(symbols.astype(np.uint16) >= 2 ** (PRECISION[size] + 1))
    left = table[symbols[some]]
    order = some[np.argsort(left, kind="stable")]
    at = 0
    for count, many in enumerate(np.bincount(left, minlength=1)):
        if many:
            yield count, order[at : at + many]
            at += many


def _widths(count: int) -> list[int]:
    """Whole bytes, then 4, 2 and 1 bits."""
    return [8] * (count // 8) + [width for width in (4, 2, 1) if count % 8 & width]


def _packed(codes: Bytes, width: int) -> Bytes:
    per_byte = 8 // width
    padded = np.pad(codes, (0, -len(codes) % per_byte)).reshape(-1, per_byte)
    out = np.zeros(len(padded), np.uint8)
    for place in range(per_byte):
        out |= padded[:, place] << np.uint8(place * width)
    return out


def _unpacked(packed: Bytes, width: int, count: int) -> Bytes:
    if width == 8:
        return packed
    fields = [packed >> np.uint8(at) & np.uint8(2**width - 1) for at in range(0, 8, width)]
    return np.stack(fields, axis=1).reshape(-1)[:count]


def _ordered(words: Words, dtype: str) -> Words:
    """Places in the order of all numbers of a dtype; wrapping around for what is no float."""
    if dtype not in FLOATS:
        return words
    bits = 8 * words.itemsize - 1
    negative = (words.view(_SIGNED[words.itemsize]) >> bits).view(words.dtype)
    found: Words = words ^ (negative | words.dtype.type(1 << bits))
    return found


def _unordered(places: Words, dtype: str) -> Words:
    if dtype not in FLOATS:
        return places
    bits = 8 * places.itemsize - 1
    positive = (places.view(_SIGNED[places.itemsize]) >> bits).view(places.dtype)
    found: Words = places ^ (~positive | places.dtype.type(1 << bits))
    return found


def _lengths(numbers: Words) -> NDArray[np.int64]:
    """How many bits each number has, 0 for 0."""
    if numbers.itemsize <= 4:
        # Exact: a float64 holds 53 bits.
        return np.frexp(numbers.astype(np.float64))[1].astype(np.int64)
    high = (numbers >> np.uint64(32)).astype(np.uint32)
    low = numbers.astype(np.uint32)
    return np.where(high > 0, _lengths(high) + 32, _lengths(low))


@lru_cache(maxsize=2)
def _small_table(size: int) -> Bytes:
    """By number: its symbol."""
    every = np.arange(2 ** (8 * size), dtype=np.uint32)
    left = np.maximum(_lengths(every) - (PRECISION[size] + 1), 0).astype(np.uint8)
    return ((left << np.uint8(PRECISION[size])) + (every >> left)).astype(np.uint8)
