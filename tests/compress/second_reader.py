"""A reader of the format, written from `docs/format.md` alone: one function a term.

It shares no code with the library: numpy, zstandard and the standard library are all it knows.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
}


def read(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Dtype name and array of every tensor of a file; BF16 as its bits."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            e["dtype"],
            np.frombuffer(
                raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]],
                NUMPY[e["dtype"]],
            ).reshape(e["shape"]),
        )
        for name, e in header.items()
    }


def to_float(dtype: str, array: np.ndarray) -> np.ndarray:
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def matrix_of(shape: list[int]) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, math.prod(shape)
    if len(shape) == 3 and shape[2] >= 32:
        return shape[0] * shape[1], shape[2]
    return shape[0], math.prod(shape[1:])


def codes_of(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    single = np.unpackbits(packed, axis=-1, bitorder="little").astype(np.int64)
    at = np.arange(columns)[:, None] * bits + np.arange(bits)
    return (single[..., at] << np.arange(bits)).sum(axis=-1)


def scales_of(parts, key: str, fmt: str) -> np.ndarray:
    values = parts[key].astype(np.float32)
    if fmt == "float32":
        return values
    unit = parts[f"{key}_unit"]
    return values * unit.reshape(-1, *[1] * (values.ndim - 1)) if unit.size > 1 else values * unit


def words_of(count: int, seed: int, name: str) -> np.ndarray:
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    low = 2**32 - 1
    words: list[int] = []
    for block in range(-(-count // 4)):
        c = [block & low, block >> 32, stream & low, stream >> 32]
        k = [seed & low, seed >> 32]
        for _ in range(10):
            first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [second >> 32 ^ c[1] ^ k[0], second & low, first >> 32 ^ c[3] ^ k[1], first & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        words += c
    return np.array(words[:count], dtype=np.int64)


def keep(count: int, drop: float, seed: int, name: str) -> np.ndarray:
    return words_of(count, seed, name) >= min(round(drop * 2**32), 2**32)


def choose(kept, length: int, seed: int, name: str) -> np.ndarray:
    words = words_of(len(kept) * length, seed, name).reshape(len(kept), length)
    mask = np.zeros(words.shape, bool)
    for k, row in enumerate(words):
        mask[k, sorted(range(length), key=lambda i: (-row[i], i))[: kept[k]]] = True
    return mask


def spread(parts, key: str, term, bits: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of every entry of rows of `length`."""
    scale = scales_of(parts, f"{key}scales", term["scale_format"])
    if term.get("symmetric", True):
        zero = np.full(scale.shape, 2 ** (bits - 1))
    else:
        zero = codes_of(parts[f"{key}zeros"], bits, scale.shape[1])
    group = np.arange(length) // min(term["group"] or length, length)
    return scale[:, group], zero[:, group].astype(np.float32)


FLOATS = {"F64": (52, 11), "F32": (23, 8), "F16": (10, 5), "BF16": (7, 8)}


def value_of(term, parts, shape, base):
    """The fine-tune's tensor as (dtype, array), where the term stores it."""
    if term["id"] == "exact":
        return term["dtype"], parts["value"]
    dtype = term["dtype"]
    size = np.dtype(NUMPY[dtype]).itemsize
    below = None if base is None else np.ascontiguousarray(base[1]).reshape(-1).view(f"<u{size}")
    if base is not None and term["mode"] in ("xor", "difference"):
        assert base[0] == dtype
    words = (streams if term["v"] == 1 else coded)(term, parts, math.prod(shape), size, below)
    return dtype, words.view(NUMPY[dtype]).reshape(shape)


def streams(term, parts, count, size, below):
    words = np.zeros((count, size), np.uint8)
    for k in range(size):
        raw = zstandard.ZstdDecompressor().decompress(parts[f"stream{k}"].tobytes())
        words[:, k] = np.frombuffer(raw, np.uint8)
    flat = words.reshape(-1).view(f"<u{size}")
    if size > 1:
        flat = (flat >> flat.dtype.type(1)) | (flat << flat.dtype.type(8 * size - 1))
    return flat ^ below if term["mode"] == "xor" else flat


def coded(term, parts, count, size, below):
    if term["mode"] == "plain":
        return parts["low"].view(f"<u{size}")
    raw = zstandard.ZstdDecompressor().decompress(parts["tables"].tobytes())
    own, rest = raw[:256], np.frombuffer(raw[256:], np.uint8).astype(int)
    half = len(rest) // 2
    tables = (rest[:half] + 256 * rest[half:]).reshape(-1, 256)
    bits, p = 8 * size, {1: 7, 2: 4, 4: 3, 8: 2}[size]
    mantissa, exponent = FLOATS.get(term["dtype"], (0, 0))
    near = term["mode"] == "difference"
    out, at = [], {"states": 0, "words": 0, "low": 0}
    for number, start in enumerate(range(0, count, term["block"])):
        n = min(term["block"], count - start)
        lanes = -(-n // term["depth"])
        take = {"states": 4 * lanes, "words": term["words"][number], "low": term["low"][number]}
        part = {key: parts[key][at[key] : at[key] + size_] for key, size_ in take.items()}
        at = {key: at[key] + take[key] for key in at}
        olds = [int(w) for w in below[start : start + n]] if near else [0] * n
        mask = min(2**exponent - 1, 255)
        contexts = [own[(w >> mantissa) & mask] if exponent and near else own[0] for w in olds]
        symbols = ans(contexts, tables, part["states"].view("<u4"), part["words"].view("<u2"))
        if near:
            k = [max((s >> p) - 1, 0) for s in symbols]
            top = [s - (left << p) for s, left in zip(symbols, k, strict=True)]
        else:
            k, top = [bits - 8] * n, symbols
        low = low_bits(part["low"], k)
        for s, left, bottom, old in zip(top, k, low, olds, strict=True):
            z = (s << left) + bottom
            if near:
                step = -(z + 1) // 2 if z % 2 else z // 2
                z = place_to_word(
                    (word_to_place(old, bits, exponent) + step) % 2**bits, bits, exponent
                )
            elif exponent:
                z = (z >> 1) | (z & 1) << (bits - 1)
            out.append(z)
    return np.array(out, dtype=f"<u{size}")


def word_to_place(word, bits, exponent):
    if not exponent:
        return word
    sign = 1 << (bits - 1)
    return (2**bits - 1) ^ word if word & sign else word | sign


def place_to_word(place, bits, exponent):
    if not exponent:
        return place
    sign = 1 << (bits - 1)
    return place ^ sign if place & sign else (2**bits - 1) ^ place


def ans(contexts, tables, states, words):
    state, at, symbols = [int(s) for s in states], 0, []
    for i, context in enumerate(contexts):
        frequencies, lane = tables[context], i % len(state)
        slot, symbol, start = state[lane] % 8192, 0, 0
        while start + frequencies[symbol] <= slot:
            start, symbol = start + int(frequencies[symbol]), symbol + 1
        x = int(frequencies[symbol]) * (state[lane] // 8192) + slot - start
        if x < 65536:
            x, at = x * 65536 + int(words[at]), at + 1
        state[lane] = x
        symbols.append(symbol)
    assert at == len(words)
    assert set(state) == {65536}
    return symbols


def low_bits(packed, counts):
    low, at = [0] * len(counts), 0
    for count in sorted(set(counts) - {0}):
        places, shift = [i for i, k in enumerate(counts) if k == count], 0
        for width in [8] * (count // 8) + [w for w in (4, 2, 1) if count % 8 & w]:
            nbytes = -(-len(places) * width // 8)
            piece = codes_of(packed[at : at + nbytes], width, len(places))
            for place, value in zip(places, piece, strict=True):
                low[place] |= int(value) << shift
            at, shift = at + nbytes, shift + width
    assert at == len(packed)
    return low


class Stored(NamedTuple):
    """A term as it lies on disk; `base` is (dtype, array) or None, `shared` what a family holds."""

    term: dict[str, Any]
    parts: dict[str, np.ndarray]
    shape: list[int]
    name: str
    base: tuple[str, np.ndarray] | None
    shared: np.ndarray | None = None


READERS: dict[str, Callable[[Stored], np.ndarray]] = {}


def reader(term_id: str) -> Callable[[Any], Any]:
    """Decorator: the function that decodes a term."""

    def note(function: Any) -> Any:
        READERS[term_id] = function
        return function

    return note


def decode(term, parts, shape, name, base, shared=None) -> np.ndarray:
    """A term's difference."""
    return READERS[term["id"]](Stored(term, parts, shape, name, base, shared))


@reader("planes")
def planes(s: Stored) -> np.ndarray:
    rows, columns = matrix_of(s.shape)
    scale = scales_of(s.parts, "scales", s.term["scale_format"])
    total = np.zeros((rows, columns), np.float32)
    for i in range(s.term["bits"]):
        plus = codes_of(s.parts["signs"][i], 1, columns)
        if s.term["scale"] == "group":
            level = scale[i][:, np.arange(columns) // s.term["group"]]
        else:
            level = scale[i].reshape(-1, 1)
        total += np.where(plus == 1, level, -level)
    return total.reshape(s.shape)


@reader("blocks")
def blocks(s: Stored) -> np.ndarray:
    rows, columns = matrix_of(s.shape)
    found = []
    for index, start in enumerate(range(0, rows, s.term["rows"])):
        stop = min(start + s.term["rows"], rows)
        inner = s.term["inner"][index if len(s.term["inner"]) > 1 else 0]
        parts = {k[len(f"{index}.") :]: v for k, v in s.parts.items() if k.startswith(f"{index}.")}
        base = None
        if s.base is not None:
            base = (s.base[0], s.base[1].reshape(rows, columns)[start:stop])
        shape = [stop - start, columns]
        found.append(decode(inner, parts, shape, f"{s.name}[{index}]", base))
    return np.concatenate(found).reshape(s.shape)


@reader("column-planes")
def column_planes(s: Stored) -> np.ndarray:
    rows, columns = matrix_of(s.shape)
    scale = scales_of(s.parts, "scales", s.term["scale_format"])
    total = np.zeros((rows, columns), np.float32)
    for i in range(s.term["bits"]):
        plus = codes_of(s.parts["signs"][i], 1, columns)
        total += np.where(plus == 1, scale[i], -scale[i])
    return total.reshape(s.shape)


@reader("codebook")
def codebook(s: Stored) -> np.ndarray:
    rows, columns = matrix_of(s.shape)
    table = scales_of(s.parts, "table", s.term["table_format"])
    codes = codes_of(s.parts["codes"], 1 + int(math.log2(s.term["levels"])), columns)
    row = np.arange(rows)[:, None] if s.term["scale"] == "row" else 0
    level = table[row, codes // 2]
    return np.where(codes % 2 == 1, level, -level).reshape(s.shape)


@reader("codes")
def codes(s: Stored) -> np.ndarray:
    _, columns = matrix_of(s.shape)
    bits = s.term["bits"]
    scale = scales_of(s.parts, "scales", s.term["scale_format"])
    group = min(s.term["group"] or columns, columns)
    level = scale[:, np.arange(columns) // group]
    centred = codes_of(s.parts["codes"], bits, columns).astype(np.float32)
    return ((centred - 2 ** (bits - 1)) * level).reshape(s.shape)


@reader("columns")
def columns(s: Stored) -> np.ndarray:
    out = np.zeros(matrix_of(s.shape), np.float32)
    inner = {k.removeprefix("inner."): v for k, v in s.parts.items() if k.startswith("inner.")}
    shape = [len(out), s.term["count"]]
    out[:, s.parts["index"]] = decode(s.term["inner"], inner, shape, s.name, None)
    return out.reshape(s.shape)


@reader("lowrank")
def lowrank(s: Stored) -> np.ndarray:
    a, b = (scales_of(s.parts, key, s.term["factor_format"]) for key in "ab")
    return (b @ a).reshape(s.shape)


@reader("banded")
def banded(s: Stored) -> np.ndarray:
    t, (rows, columns) = s.term, matrix_of(s.shape)
    most, first, factors = max(min(rows, columns), 1), 0, {"a": [], "b": []}
    masks = {}
    if t["masked"]:
        lengths = zip("ab", (columns, rows), s.parts["kept"], strict=True)
        masks = {f: choose(kept, n, t["seed"], f"{s.name}:{f}") for f, n, kept in lengths}
    for i, (rank, bits) in enumerate(zip(t["ranks"], t["widths"], strict=True)):
        rank = min(rank, most - first)
        for f, length in (("a", columns), ("b", rows)):
            mask = masks[f][first : first + rank] if masks else np.ones((rank, length), bool)
            out = np.zeros((rank, length), np.float32)
            if bits == 16:
                out[mask] = scales_of(s.parts, f"{f}{i}.values", "float16")
            else:
                scale, zero = spread(s.parts, f"{f}{i}.", t, bits, length)
                codes = codes_of(s.parts[f"{f}{i}.codes"], bits, int(mask.sum()))
                out[mask] = (codes.astype(np.float32) - zero[mask]) * scale[mask]
            factors[f].append(out)
        first += rank
        if first == most:
            break
    a, b = (np.concatenate(factors[f]) for f in "ab")
    return (b.T @ a).reshape(s.shape)


@reader("nm")
def nm(s: Stored) -> np.ndarray:
    t, (rows, columns) = s.term, matrix_of(s.shape)
    blocks = -(-columns // t["of"])
    count = t["keep"] * blocks
    places = codes_of(s.parts["positions"], (t["of"] - 1).bit_length(), count)
    places = places + np.arange(count) // t["keep"] * t["of"]
    if t["bits"] == 16:
        values = scales_of(s.parts, "values", "float16")
    else:
        scale, zero = spread(s.parts, "", t, t["bits"], count)
        values = (codes_of(s.parts["codes"], t["bits"], count).astype(np.float32) - zero) * scale
    out = np.zeros((rows, blocks * t["of"]), np.float32)
    np.put_along_axis(out, places, values, axis=1)
    return out[:, :columns].reshape(s.shape)


@reader("dense")
def dense(s: Stored) -> np.ndarray:
    return scales_of(s.parts, "values", s.term["value_format"]).reshape(s.shape)


@reader("sparse")
def sparse(s: Stored) -> np.ndarray:
    count = math.prod(s.shape)
    if s.term["mask"] == "seed":
        mask = keep(count, s.term["drop"], s.term["seed"], s.name)
    else:
        mask = codes_of(s.parts["mask"], 1, count) == 1
    out = np.zeros(count, np.float32)
    out[mask] = scales_of(s.parts, "values", s.term["value_format"])
    return out.reshape(s.shape)


@reader("sparse-codes")
def sparse_codes(s: Stored) -> np.ndarray:
    t, total = s.term, math.prod(s.shape)
    if t["mask"] == "seed":
        places = np.flatnonzero(keep(total, t["drop"], t["seed"], s.name))
    elif t["mask"] == "bitmap":
        places = np.flatnonzero(codes_of(s.parts["mask"], 1, total))
    else:
        low = codes_of(s.parts["low"], t["rice"], t["count"]) if t["rice"] else [0] * t["count"]
        stream = iter(codes_of(s.parts["high"], 1, 8 * t["high"]).tolist())
        places, at = [], -1
        for rest in low:
            zeros = 0
            while not next(stream):
                zeros += 1
            at += (zeros << t["rice"]) + int(rest) + 1
            places.append(at)
    out = np.zeros(total, np.float32)
    if t["bits"] == 16:
        out[places] = scales_of(s.parts, "values", "float16")
    else:
        out[places] = s.parts["table"][codes_of(s.parts["codes"], t["bits"], t["count"])]
    return out.reshape(s.shape)


@reader("patches")
def patches(s: Stored) -> np.ndarray:
    t, (rows, columns) = s.term, matrix_of(s.shape)
    high, wide = min(t["size"], rows), min(t["size"], columns)
    down, across = -(-rows // high), -(-columns // wide)
    classes = np.zeros(down * across, int)
    if len(t["widths"]) > 1:
        bits = math.ceil(math.log2(len(t["widths"])))
        classes = codes_of(s.parts["classes"], bits, down * across)
    grid = {"group": 0, "scale_format": "float16", "symmetric": False}
    out = np.zeros((down * high, across * wide), np.float32)
    for i, width in enumerate(t["widths"]):
        for j, patch in enumerate(np.flatnonzero(classes == i)):
            if width == 0:
                block = scales_of(s.parts, f"{i}.means", "float16")[j]
            else:
                scale, zero = spread(s.parts, f"{i}.", grid, width, high * wide)
                codes = codes_of(s.parts[f"{i}.codes"][j], width, high * wide)
                values = ((codes - zero[j]) * scale[j]).reshape(high, wide)
                block = cosines(high).T @ values @ cosines(wide)
            r, c = patch // across * high, patch % across * wide
            out[r : r + high, c : c + wide] = block
    return out[:rows, :columns].reshape(s.shape)


def cosines(n: int) -> np.ndarray:
    k, i = np.arange(n)[:, None], np.arange(n)[None]
    rows = np.cos(np.pi * (2 * i + 1) * k / (2 * n)) * np.where(k == 0, 1, 2**0.5) / n**0.5
    return rows.astype(np.float32)


@reader("rows")
def rows(s: Stored) -> np.ndarray:
    out, index = np.zeros(s.shape, np.float32), s.parts["index"]
    inner = {k.removeprefix("inner."): v for k, v in s.parts.items() if k.startswith("inner.")}
    below = None if s.base is None else (s.base[0], s.base[1][index])
    inner_shape = [s.term["count"], *s.shape[1:]]
    out[index] = decode(s.term["inner"], inner, inner_shape, s.name, below)
    if s.term["added"]:
        out[-s.term["added"] :] = to_float(s.term["dtype"], s.parts["added"])
    return out


@reader("shared")
def shared(s: Stored) -> np.ndarray:
    rows, columns = matrix_of(s.shape)
    bits = next(b for b in (1, 2, 4, 8) if 2**b >= s.term["groups"])
    index = codes_of(s.parts["index"], bits, rows).astype(int) if "index" in s.parts else 0
    out = s.shared[index * rows + np.arange(rows)]
    if s.term["masked"]:
        out = out * codes_of(s.parts["mask"], 1, columns).astype(np.float32)
    return (out * np.float32(s.term["scale"])).reshape(s.shape)


@reader("exact")
@reader("lossless")
def values(s: Stored) -> np.ndarray:
    value = to_float(*value_of(s.term, s.parts, s.shape, s.base))
    return value if s.base is None else value - to_float(*s.base)
