"""Seconds and peak memory of packing a set of tensors, method by method."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from deltafold.compress import Recipe, parse_spec
from deltafold.compress.encode import encode_tensor, measure
from deltafold.compress.evidence import NEEDS, Evidence

_GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """One method on the set. `seconds` as measured; `peak` in bytes above what was held before."""

    spec: str
    seconds: float
    peak: int | None
    note: str = ""


class MadeUp:
    """Evidence of random inputs and gradients: costs what real evidence costs."""

    provides = NEEDS

    def __init__(self, size: int) -> None:
        draw = torch.Generator().manual_seed(1)
        inputs = torch.randn(2 * size, size, generator=draw)
        self._known = Evidence(
            second_moment=inputs.T @ inputs / len(inputs),
            gradient=torch.randn(size, size, generator=draw),
            fisher=torch.rand(size, size, generator=draw),
            inputs=inputs[:256],
        )

    def of(self, name: str) -> Evidence:
        """The same for every tensor."""
        return self._known


def factor(size: int, count: int) -> float:
    """How many such sets make a GiB of bfloat16 tensors."""
    return _GIB / (2 * size * size * count)


def costs(specs: list[str], *, size: int, count: int) -> list[Cost]:
    """Encode and check `count` tensors `[size, size]`, one at a time, as packing does."""
    evidence = MadeUp(size)
    if specs:
        _cost(specs[0], size, 1, evidence)  # what is loaded on first use counts for nobody
    return [_cost(spec, size, count, evidence) for spec in specs]


def _cost(spec: str, size: int, count: int, evidence: MadeUp) -> Cost:
    draw = torch.Generator().manual_seed(0)
    before = _reset_peak()
    seconds = 0.0
    try:
        recipe = Recipe(default=parse_spec(spec))
        for number in range(count):
            base = torch.randn(size, size, generator=draw).mul_(0.02).to(torch.bfloat16)
            step = torch.randn(size, size, generator=draw).mul_(0.001)
            value = (base.to(torch.float32) + step).to(torch.bfloat16)
            del step
            began = time.perf_counter()
            encoded, delta = encode_tensor(f"w{number}", value, base, recipe, evidence)
            measure(f"w{number}", encoded, delta, base)
            seconds += time.perf_counter() - began
    except Exception as error:
        return Cost(spec, seconds, None, f"{type(error).__name__}: {error}".splitlines()[0])
    peak = _peak()
    return Cost(spec, seconds, None if before is None or peak is None else max(peak - before, 0))


def _reset_peak() -> int | None:
    """Give freed memory back, start the kernel's high-water mark again; what is held now, in bytes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _peak()


def _peak() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
