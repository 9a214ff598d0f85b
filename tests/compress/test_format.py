"""A second reader, written from `docs/format.md` alone, must find the same as ours.

It shares no code with the library: numpy, zstandard and the standard library are all it knows.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from checkpoints import make_pair

from deltafold.compress import Checkpoint, DeltaRepo, Recipe, compress_checkpoint, parse_spec

GOLDEN = Path(__file__).parents[1] / "golden"
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


def decode(term, parts, shape, name, base) -> np.ndarray:
    """A term's difference; `base` is (dtype, array) or None."""
    rows, columns = matrix_of(shape)
    if term["id"] == "planes":
        scale = scales_of(parts, "scales", term["scale_format"])
        total = np.zeros((rows, columns), np.float32)
        for i in range(term["bits"]):
            plus = codes_of(parts["signs"][i], 1, columns)
            if term["scale"] == "group":
                level = scale[i][:, np.arange(columns) // term["group"]]
            else:
                level = scale[i].reshape(-1, 1)
            total += np.where(plus == 1, level, -level)
        return total.reshape(shape)
    if term["id"] == "codes":
        scale = scales_of(parts, "scales", term["scale_format"])
        group = min(term["group"] or columns, columns)
        level = scale[:, np.arange(columns) // group]
        centred = codes_of(parts["codes"], term["bits"], columns).astype(np.float32)
        return ((centred - 2 ** (term["bits"] - 1)) * level).reshape(shape)
    if term["id"] == "lowrank":
        a, b = (scales_of(parts, key, term["factor_format"]) for key in "ab")
        return (b @ a).reshape(shape)
    if term["id"] == "sparse":
        count = math.prod(shape)
        if term["mask"] == "seed":
            mask = keep(count, term["drop"], term["seed"], name)
        else:
            mask = codes_of(parts["mask"], 1, count) == 1
        out = np.zeros(count, np.float32)
        out[mask] = scales_of(parts, "values", term["value_format"])
        return out.reshape(shape)
    if term["id"] == "rows":
        out, index = np.zeros(shape, np.float32), parts["index"]
        inner = {k.removeprefix("inner."): v for k, v in parts.items() if k.startswith("inner.")}
        below = None if base is None else (base[0], base[1][index])
        inner_shape = [term["count"], *shape[1:]]
        out[index] = decode(term["inner"], inner, inner_shape, name, below)
        if term["added"]:
            out[-term["added"] :] = to_float(term["dtype"], parts["added"])
        return out
    value = to_float(*value_of(term, parts, shape, base))
    return value if base is None else value - to_float(*base)


@pytest.mark.parametrize("stem", sorted(path.stem for path in GOLDEN.glob("*.json")))
def test_golden_files(stem):
    description = json.loads((GOLDEN / f"{stem}.json").read_text("utf-8"))
    stored = read(GOLDEN / f"{stem}.safetensors")
    parts = {k.removeprefix("part."): v[1] for k, v in stored.items() if k.startswith("part.")}
    if description["term"]["id"] == "rows" and description["term"]["added"]:
        assert stored["part.added"][0] == description["term"]["dtype"]
    arguments = (parts, description["shape"], description["name"], stored.get("base"))
    found, expected = decode(description["term"], *arguments), stored["decoded"][1]
    if description["tolerance"]:
        assert np.allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    else:
        assert np.array_equal(found, expected)


def compact(value) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def test_digests_of_a_real_delta(tmp_path):
    pair = make_pair(tmp_path)
    recipe = Recipe(default=parse_spec("int"), overrides=(("*up*", parse_spec("dare")),))
    compress_checkpoint(pair.base, pair.variant, pair.out, recipe=recipe)
    manifest = json.loads((pair.out / "delta_config.json").read_text("utf-8"))

    lines = b""
    for name, (dtype, array) in sorted(read(pair.base / "model.safetensors").items()):
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        lines += compact([name, dtype, list(array.shape), digest]) + b"\n"
    assert manifest["base"]["fingerprint"] == f"sha256:{hashlib.sha256(lines).hexdigest()}"

    payload = read(pair.out / "delta.safetensors")
    for name, entry in manifest["tensors"].items():
        total = hashlib.sha256()
        for number in range(len(entry["terms"])):
            prefix = f"{name}.{number}."
            for key in sorted(k for k in payload if k.startswith(prefix)):
                dtype, array = payload[key]
                head = compact([number, key.removeprefix(prefix), dtype, list(array.shape)])
                total.update(struct.pack("<Q", len(head)) + head + array.tobytes())
        assert entry["payload_sha256"] == total.hexdigest()

    content = {
        "absent": sorted(manifest["absent"]),
        "base": manifest["base"]["fingerprint"],
        "files": {n: f["sha256"] for n, f in manifest["files"].items() if f["sha256"]},
        "format": "deltafold",
        "major": "1",
        "tensors": {
            n: [e["shape"], e["dtype"], e["terms"], e["payload_sha256"]]
            for n, e in manifest["tensors"].items()
        },
        "unchanged": sorted(manifest["unchanged"]),
    }
    assert manifest["delta_id"] == f"sha256:{hashlib.sha256(compact(content)).hexdigest()}"


def test_a_real_delta(tmp_path):
    pair = make_pair(tmp_path)
    compress_checkpoint(pair.base, pair.variant, pair.out)
    repo, base = DeltaRepo.open(pair.out), Checkpoint.open(pair.base)
    plain, payload = read(pair.base / "model.safetensors"), read(pair.out / "delta.safetensors")
    for name, entry in repo.manifest.tensors.items():
        total = np.zeros(entry.shape, np.float32)
        for number, term in enumerate(entry.terms):
            prefix = f"{name}.{number}."
            parts = {k.removeprefix(prefix): v[1] for k, v in payload.items() if prefix in k}
            total += decode(term, parts, list(entry.shape), name, plain[name])
        assert torch.equal(torch.from_numpy(total), repo.delta(name, base.tensor(name)))
