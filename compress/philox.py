"""The random numbers that the format fixes: Philox4x32-10.

A mask that is not stored must come out the same on every machine and with every version of every
library, so the generator is part of the format. Philox is counter-based: element `i` needs no
element before it, so masks can be made in blocks and in parallel.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section
3.3 and the constants of its table 2.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)

Words = NDArray[np.uint32]


def philox(counters: NDArray[np.uint64], stream: int, seed: int) -> Words:
    """Four random words for each counter.

    Args:
        counters: uint64 `[n]`, the low half of the 128-bit counter.
        stream: the high half, 64 bits.
        seed: the key, 64 bits.

    Returns:
        uint32 `[n, 4]`.
    """
    c0, c1 = counters & _LOW, counters >> _32
    c2 = np.full_like(c0, stream & 0xFFFFFFFF)
    c3 = np.full_like(c0, (stream >> 32) & 0xFFFFFFFF)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c2 = (p1 >> _32) ^ c1 ^ np.uint64(k0), (p0 >> _32) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def stream_of(name: str) -> int:
    """The stream of a tensor: the first 8 bytes of its name's sha256, little-endian."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def words_of(count: int, *, seed: int, name: str) -> Words:
    """`count` random words of a tensor: element `i` takes word `i % 4` of counter `i // 4`.

    Returns:
        uint32 `[count]`.
    """
    stream, block = stream_of(name), 1 << 20
    words = np.empty(count, dtype=np.uint32)
    for start in range(0, count, 4 * block):
        stop = min(start + 4 * block, count)
        counters = np.arange(start // 4, (stop + 3) // 4, dtype=np.uint64)
        words[start:stop] = philox(counters, stream, seed).reshape(-1)[: stop - start]
    return words


def choose(kept: NDArray[np.int64], length: int, *, seed: int, name: str) -> NDArray[np.bool_]:
    """Exactly `kept[k]` of each row's elements: those with the largest words, earlier ones first.

    Args:
        kept: int64 `[rows]`, each from 0 to `length`.
        length: elements of a row.
        seed: the key.
        name: the stream; words run on over the rows.

    Returns:
        bool `[rows, length]`.
    """
    words = words_of(len(kept) * length, seed=seed, name=name).reshape(len(kept), length)
    order = np.argsort(~words, axis=1, kind="stable")
    chosen = np.empty(words.shape, dtype=np.bool_)
    np.put_along_axis(chosen, order, np.arange(length) < kept[:, None], axis=1)
    return chosen


def keep_mask(count: int, *, drop: float, seed: int, name: str) -> NDArray[np.bool_]:
    """Which of `count` elements a random drop keeps.

    Element `i` takes word `i % 4` of counter `i // 4` and is kept where that word is at least
    `round(drop * 2**32)`: a Bernoulli mask with `P(drop)` exact to 2**-32.

    Returns:
        bool `[count]`.
    """
    threshold = np.uint64(min(round(drop * 2**32), 2**32))
    stream, block = stream_of(name), 1 << 20
    keep = np.empty(count, dtype=np.bool_)
    for start in range(0, count, 4 * block):
        stop = min(start + 4 * block, count)
        counters = np.arange(start // 4, (stop + 3) // 4, dtype=np.uint64)
        words = philox(counters, stream, seed).reshape(-1)[: stop - start]
        keep[start:stop] = words.astype(np.uint64) >= threshold
    return keep
