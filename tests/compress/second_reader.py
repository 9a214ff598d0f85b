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
    at = np.arange(columns) * bits
    return (packed[..., at // 8] >> (at % 8).astype(np.uint8)) & (2**bits - 1)


def scales_of(parts, key: str, fmt: str) -> np.ndarray:
    values = parts[key].astype(np.float32)
    if fmt == "float32":
        return values
    unit = parts[f"{key}_unit"]
    return values * unit.reshape(-1, *[1] * (values.ndim - 1)) if unit.size > 1 else values * unit


def keep(count: int, drop: float, seed: int, name: str) -> np.ndarray:
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
    return np.array(words[:count]) >= min(round(drop * 2**32), 2**32)


def value_of(term, parts, shape, base):
    """The fine-tune's tensor as (dtype, array), where the term stores it."""
    if term["id"] == "exact":
        return term["dtype"], parts["value"]
    dtype = term["dtype"]
    words = np.zeros((math.prod(shape), np.dtype(NUMPY[dtype]).itemsize), np.uint8)
    for k in range(words.shape[1]):
        raw = zstandard.ZstdDecompressor().decompress(parts[f"stream{k}"].tobytes())
        words[:, k] = np.frombuffer(raw, np.uint8)
    size = words.shape[1]
    flat = words.reshape(-1).view(f"<u{size}")
    if size > 1:
        flat = (flat >> flat.dtype.type(1)) | (flat << flat.dtype.type(8 * size - 1))
    if term["mode"] == "xor":
        assert base[0] == dtype
        flat = flat ^ np.ascontiguousarray(base[1]).reshape(-1).view(f"<u{size}")
    return dtype, flat.view(NUMPY[dtype]).reshape(shape)


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


@reader("codes")
def codes(s: Stored) -> np.ndarray:
    _, columns = matrix_of(s.shape)
    bits = s.term["bits"]
    scale = scales_of(s.parts, "scales", s.term["scale_format"])
    group = min(s.term["group"] or columns, columns)
    level = scale[:, np.arange(columns) // group]
    centred = codes_of(s.parts["codes"], bits, columns).astype(np.float32)
    return ((centred - 2 ** (bits - 1)) * level).reshape(s.shape)


@reader("lowrank")
def lowrank(s: Stored) -> np.ndarray:
    a, b = (scales_of(s.parts, key, s.term["factor_format"]) for key in "ab")
    return (b @ a).reshape(s.shape)


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
        out = out * codes_of(s.parts["mask"], 1, columns)
    return (out * np.float32(s.term["scale"])).reshape(s.shape)


@reader("exact")
@reader("lossless")
def values(s: Stored) -> np.ndarray:
    value = to_float(*value_of(s.term, s.parts, s.shape, s.base))
    return value if s.base is None else value - to_float(*s.base)
