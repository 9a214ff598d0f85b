"""One linear layer: the base alone, base + deltas of 8 variants, and 8 dense copies.

    python benchmarks/linear.py [--device cpu] [--size 4096] [--variants 8] [--json FILE]

Everything is timed in one run, round-robin, so that a busy machine slows all rows alike. Printed are
the minimum and median over the rounds, and ratios of minima. Rows: y = x W^T for 8 tokens (the base);
the base plus one delta product a variant (1 token each), by codec; and what serving merged
checkpoints would do, a dense product a variant with weights of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deltafold.compress import parse_spec
from deltafold.compress.terms import Context, Encoded
from deltafold.runtime.kernels.forms import Target, product_form
from deltafold.runtime.kernels.native import signs_library

CODECS = (
    "bitdelta:bits=1",
    "bitdelta:bits=1,group=128",
    "bitdelta:bits=2",
    "bitdelta:bits=4",
    "int:bits=4,group=128",
    "dare:drop=0.9",
    "dare:drop=0.99",
    "svd:rank=16",
)


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.manual_seed(0)
    size, variants = options.size, options.variants
    delta = torch.randn(size, size) * 1e-3
    stored = {spec: parse_spec(spec).encode(delta, Context("layer.weight")) for spec in CODECS}
    rows: dict[str, Callable[[], torch.Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows |= _cases(size, variants, Target(torch.device(options.device), dtype), stored)
    times = _round_robin(rows, options.rounds, options.device)
    table = [_row(name, times, size) for name in rows]
    _print(table, options)
    if options.json:
        result = {"machine": machine(options.device), "rows": table}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json")
    return parser.parse_args()


def _cases(
    size: int, variants: int, target: Target, stored: dict[str, list[Encoded]]
) -> dict[str, Callable[[], torch.Tensor]]:
    device, dtype = target.device, target.dtype
    label = str(dtype).removeprefix("torch.")
    weight = torch.randn(size, size).to(device, dtype)
    x = torch.randn(variants, size).to(device, dtype)
    linear = torch.nn.functional.linear

    def base() -> torch.Tensor:
        return linear(x, weight)

    copies = [(weight + i).to(dtype) for i in range(variants)]

    def dense() -> torch.Tensor:
        return torch.cat([linear(x[i : i + 1], copies[i]) for i in range(variants)])

    cases = {f"{label} base": base, f"{label} dense copies": dense}
    for spec, encoded in stored.items():
        forms = [
            product_form(encoded, (size, size), Context("layer.weight"), target)
            for _ in range(variants)
        ]

        def mixed(forms: list = forms) -> torch.Tensor:  # type: ignore[type-arg]
            y = linear(x, weight)
            for i, form in enumerate(forms):
                y[i : i + 1] += form.matmul(x[i : i + 1])
            return y

        cases[f"{label} {spec}"] = mixed
    return cases


def _round_robin(
    cases: dict[str, Callable[[], torch.Tensor]], rounds: int, device: str
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.inference_mode():
        for call in cases.values():
            call()
        if device != "cpu":
            torch.cuda.synchronize()
        for _ in range(rounds):
            for name, call in cases.items():
                start = time.perf_counter()
                call()
                if device != "cpu":
                    torch.cuda.synchronize()
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _row(name: str, times: dict[str, list[float]], size: int) -> dict[str, object]:
    label, _, case = name.partition(" ")
    base, dense = min(times[f"{label} base"]), min(times[f"{label} dense copies"])
    least = min(times[name])
    return {
        "dtype": label,
        "case": case,
        "size": size,
        "min_ms": least,
        "median_ms": statistics.median(times[name]),
        "over_base": least / base,
        "over_dense": least / dense,
    }


def machine(device: str) -> dict[str, str]:
    """What the figures depend on besides this code."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": platform.machine() if device == "cpu" else torch.cuda.get_device_name(device),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "own kernel": "yes" if signs_library() else "no",
    }


def _print(table: list[dict[str, object]], options: argparse.Namespace) -> None:
    print(f"linear {options.size} x {options.size}, {options.variants} variants x 1 token")
    print(", ".join(f"{key} {value}" for key, value in machine(options.device).items()))
    print(f"{'dtype':<9} {'case':<28} {'min ms':>8} {'median':>8} {'x base':>7} {'x dense':>8}")
    for row in table:
        print(
            f"{row['dtype']:<9} {row['case']:<28} {row['min_ms']:>8.2f} {row['median_ms']:>8.2f} "
            f"{row['over_base']:>7.2f} {row['over_dense']:>8.2f}"
        )


if __name__ == "__main__":
    main()
