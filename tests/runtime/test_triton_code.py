"""The inline assembly of the GPU kernels, emulated, and what all kernels compile to for absent GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from deltafold.runtime.kernels.triton.unpack import unpack_code


@pytest.mark.parametrize("bfloat", [True, False], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_assembly_unpacks_every_word(bits: int, bfloat: bool) -> None:
    """Each of its five instructions, done by numpy on all words: only a GPU runs the real ones."""
    low = np.arange(2**16, dtype=np.uint32)
    pairs = low | (np.roll(low, 12345) << np.uint32(16))
    for field in range(16 // bits):
        out = run_ptx(unpack_code(bits, field, bfloat), pairs, bfloat)
        for half, words in ((out & 0xFFFF, pairs & 0xFFFF), (out >> 16, pairs >> 16)):
            q = (words >> (bits * field) & (2**bits - 1)).astype(np.float32)
            expected = 2 * q - 1 if bits == 1 else q - 2 ** (bits - 1)
            assert np.array_equal(from_half(half, bfloat), expected), (bits, field)


def from_half(bits: np.ndarray, bfloat: bool) -> np.ndarray:
    if bfloat:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def to_half(values_: np.ndarray, bfloat: bool) -> np.ndarray:
    """Only for numbers that the type holds exactly."""
    if bfloat:
        raw = values_.astype(np.float32).view(np.uint32)
        assert not (raw & 0xFFFF).any()
        return raw >> np.uint32(16)
    assert np.array_equal(values_.astype(np.float16).astype(np.float32), values_)
    return values_.astype(np.float16).view(np.uint16).astype(np.uint32)


def run_ptx(code: str, word: np.ndarray, bfloat: bool) -> np.ndarray:
    names: dict[str, np.ndarray] = {"$1": word}

    def value(name: str) -> np.ndarray:
        return names[name] if name in names else np.uint32(int(name, 0))

    for line in code.strip("{} ").split(";"):
        op, _, rest = line.strip().partition(" ")
        if not op or op == ".reg":
            continue
        to, *given = [part.strip() for part in rest.split(",")]
        a = value(given[0])
        names[to] = PTX[op](a, [value(g) for g in given[1:]], bfloat)
    return names["$0"]


def _lop3(a: np.ndarray, rest: list[np.ndarray], bfloat: bool) -> np.ndarray:
    b, c, table = rest
    out = np.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            terms = [v if i >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0))]
            out |= terms[0] & terms[1] & terms[2]
    return out


def _fma(a: np.ndarray, rest: list[np.ndarray], bfloat: bool) -> np.ndarray:
    halves = []
    for shift in (0, 16):
        x, m, c = (from_half(v >> np.uint32(shift) & np.uint32(0xFFFF), bfloat) for v in (a, *rest))
        halves.append(to_half(x * m + c, bfloat))
    return halves[0] | halves[1] << np.uint32(16)


PTX: dict[str, Callable[[np.ndarray, list[np.ndarray], bool], np.ndarray]] = {
    "mov.b32": lambda a, rest, bfloat: a,
    "shl.b32": lambda a, rest, bfloat: a << rest[0],
    "shr.u32": lambda a, rest, bfloat: a >> rest[0],
    "lop3.b32": _lop3,
    "fma.rn.bf16x2": _fma,
    "fma.rn.f16x2": _fma,
}


#: Registers a thread that each kind of kernel may take, a little above what it takes.
REGISTERS = {
    "apply": 128,
    "add splits": 48,
    "expand": 48,
    "merge": 255,
    "look up": 80,
    "shrink": 168,
    "stretch": 240,
    "dense": 255,
    "sparse": 80,
    "scatter": 128,
}
#: Instructions a weight in the main loop; at 0.93 of them an H200 reads 1-bit weights at full speed.
LOOPS = {
    # It multiplies each weight by 128 tokens: at 8.0 it takes as long as the tensor cores on an H200.
    "merge 1 bit, 1 slices": 12.0,
    "merge": 15.0,
    "apply 1 bit, 8 tokens, groups of 4096": 1.45,
    "apply 1 bit, 8 tokens, groups of 128": 1.8,
    "apply 1 bit, 64 tokens": 3.0,
    "apply 2 bit, 16 tokens": 2.0,
    "apply 4 bit, 16 tokens": 3.0,
}
#: Shared memory of a block of threads: the least of GPUs that run code for sm_80, and an H100's.
SHARED = {"80": 99 * 1024, "90": 227 * 1024}


def limit(limits: dict[str, Any], name: str) -> Any:
    return next((most for start, most in limits.items() if name.startswith(start)), None)


@pytest.mark.slow
@pytest.mark.parametrize("target", list(SHARED))
def test_kernels_compile_for_gpus_that_are_not_here(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All kernels; what they take is printed whether the test passes or not."""
    script = Path(__file__).with_name("triton_compile.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    call = [sys.executable, str(script), target]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    with capsys.disabled():
        print(f"\nsm_{target}: registers, bytes of stack, shared KiB, instructions a weight")
        for row in rows:
            counts = (row["registers"], row["stack"], f"{row['shared'] / 1024:.0f}")
            numbers = "".join(f"{n:>6}" for n in (*counts, row.get("loop_a_weight", "-")))
            print(f"  {row['kernel']:<62}{numbers}")
    seen = {start for start in REGISTERS if any(r["kernel"].startswith(start) for r in rows)}
    assert seen == set(REGISTERS)
    for row in rows:
        name, counts = row["kernel"], row["instructions"]
        # What does not fit the registers lies on the stack: at most a few addresses, around the loop.
        assert row["stack"] <= 32, row
        assert row["registers"] <= limit(REGISTERS, name), row
        assert row["shared"] <= SHARED[target], row
        most = limit(LOOPS, name)
        assert (most is not None) == ("loop_a_weight" in row), row
        if most is not None:
            assert row["loop_a_weight"] <= most, row
        if name.startswith("apply 1 bit, 8 tokens") and name.endswith("bf16"):
            # 14 of 16 fields take one multiply-add a pair of weights, and nothing is converted.
            assert counts["HFMA2"] == 14 * 16, row
            assert counts.get("HMMA", 0) + counts.get("HGMMA", 0) >= 64, row
            assert not {"I2F", "I2FP"} & set(counts), row
