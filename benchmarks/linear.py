"""One linear layer: the base alone, base + deltas of 8 variants, and 8 dense copies.

    python benchmarks/linear.py [--device cpu] [--size 4096] [--variants 8] [--crossings] [--json FILE]

Everything is timed in one run, round-robin, so that a busy machine slows all rows alike. Printed are
the minimum and median over the rounds, and ratios of minima. Rows: the engine's product for 8 tokens
(the base), and torch's own where it is another; the base plus one delta product a variant (1 token
each), by codec; what serving merged checkpoints would do, a dense product a variant with weights of its
own; and what making a form at load takes, beside decoding to a dense copy. `--crossings` also prints
from how many tokens on a rebuilt matrix is faster.
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
from deltafold.runtime.embedded.products import quicken
from deltafold.runtime.kernels.forms import Target, product_form
from deltafold.runtime.kernels.merged import merged_product
from deltafold.runtime.kernels.native import signs_library
from deltafold.runtime.kernels.onednn import product
from deltafold.runtime.kernels.reference import dense_delta
from deltafold.runtime.kernels.signs import SignWords

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
#: What the project wants of a CPU: times of the base, and how much faster than dense copies.
GOALS = (3.2, 3.5)
CONTEXT = Context("layer.weight")


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.manual_seed(0)
    size = options.size
    delta = torch.randn(size, size) * 1e-3
    stored = {spec: parse_spec(spec).encode(delta, CONTEXT) for spec in CODECS}
    rows: dict[str, Callable[[], torch.Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        target = Target(torch.device(options.device), dtype)
        rows |= _cases(size, options.variants, target, stored)
    times = _round_robin(rows, options.rounds, options.device)
    table = [_row(name, times, size) for name in rows]
    loads = _loads(stored, size, Target(torch.device(options.device), torch.bfloat16))
    _print(table, loads, options)
    result = {"machine": machine(options.device), "rows": table, "loads": loads}
    if options.crossings:
        result["crossings"] = _crossings(stored | _coded(delta), size)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--crossings", action="store_true")
    parser.add_argument("--json")
    return parser.parse_args()


def _cases(
    size: int, variants: int, target: Target, stored: dict[str, list[Encoded]]
) -> dict[str, Callable[[], torch.Tensor]]:
    device, dtype = target.device, target.dtype
    label = str(dtype).removeprefix("torch.")
    layer = torch.nn.Linear(size, size, bias=False).to(device, dtype).requires_grad_(False)
    weight = layer.weight.data
    x = torch.randn(variants, size).to(device, dtype)
    linear = torch.nn.functional.linear
    quick = bool(quicken(layer))

    def base() -> torch.Tensor:
        y: torch.Tensor = layer(x)
        return y

    copies = [(weight + i).to(dtype) for i in range(variants)]

    def dense() -> torch.Tensor:
        return torch.cat([linear(x[i : i + 1], copies[i]) for i in range(variants)])

    cases = {f"{label} base": base, f"{label} dense copies": dense}
    if quick:
        cases[f"{label} base by torch.nn.functional.linear"] = lambda: linear(x, weight)
    for spec, encoded in stored.items():
        forms = [product_form(encoded, (size, size), CONTEXT, target) for _ in range(variants)]

        def mixed(forms: list = forms) -> torch.Tensor:  # type: ignore[type-arg]
            y = base()
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


def _loads(stored: dict[str, list[Encoded]], size: int, target: Target) -> list[dict[str, object]]:
    """What it takes to lay a tensor out, once, when its variant is loaded."""
    shape, found = (size, size), []
    for spec, encoded in stored.items():
        ways = {
            "laid out": lambda e=encoded: product_form(e, shape, CONTEXT, target),
            "dense copy": lambda e=encoded: dense_delta(e, shape, CONTEXT).to(
                target.device, target.dtype
            ),
        }
        times = {}
        for way, make in ways.items():
            start = time.perf_counter()
            made = make()
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            times[way] = (time.perf_counter() - start) * 1e3
            if way == "laid out":
                bits = 8 * made.nbytes / size**2
        row = {"case": spec, "laid_out_ms": times["laid out"], "dense_ms": times["dense copy"]}
        found.append(row | {"bits_in_memory": bits})
    return found


def _coded(delta: torch.Tensor) -> dict[str, list[Encoded]]:
    specs = ("int:bits=3", "int:bits=8")
    return {spec: parse_spec(spec).encode(delta, CONTEXT) for spec in specs}


def _crossings(stored: dict[str, list[Encoded]], size: int) -> list[dict[str, object]]:
    """Tokens from which a product by the rebuilt matrix takes less time than one by sign words, and
    one by base and delta added up less than two.
    """
    print("\nby tokens: rebuilt matrix over words; below it one product by the sum over two")
    weight = torch.randn(size, size)
    target, found = Target(torch.device("cpu"), torch.float32), []
    for spec, encoded in stored.items():
        form = product_form(encoded, (size, size), CONTEXT, target)
        if not isinstance(form, SignWords):
            continue
        ratios, sums = {}, {}
        for tokens in (1, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256):
            x = torch.randn(tokens, size)
            calls = {"a applied": lambda f=form, x=x: f.applied(x)}
            calls["a rebuilt"] = lambda f=form, x=x: f.rebuilt(x)
            calls["two"] = lambda f=form, x=x: product(x, weight, None) + f.matmul(x)
            calls["sum"] = lambda f=form, x=x: merged_product(x, weight, None, f)
            times = _round_robin(calls, 5, "cpu")
            ratios[tokens] = min(times["a rebuilt"]) / min(times["a applied"])
            sums[tokens] = min(times["sum"]) / min(times["two"])
        for found_ratios in (ratios, sums):
            print(f"{spec:<28}" + "".join(f"{k:>5}:{r:4.2f}" for k, r in found_ratios.items()))
        planes = form.levels.shape[0]
        found.append(
            {"case": spec, "planes": planes, "used_above": form.rebuilt_above, "ratios": ratios}
        )
    return found


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


def _print(
    table: list[dict[str, object]], loads: list[dict[str, object]], options: argparse.Namespace
) -> None:
    print(f"linear {options.size} x {options.size}, {options.variants} variants x 1 token")
    print(", ".join(f"{key} {value}" for key, value in machine(options.device).items()))
    print(f"{'dtype':<9} {'case':<36} {'min ms':>8} {'median':>8} {'x base':>7} {'x dense':>8}")
    for row in table:
        print(
            f"{row['dtype']:<9} {row['case']:<36} {row['min_ms']:>8.2f} {row['median_ms']:>8.2f} "
            f"{row['over_base']:>7.2f} {row['over_dense']:>8.2f}"
        )
    most, faster = GOALS
    for row in table:
        if row["case"] == "bitdelta:bits=1" and options.device == "cpu":
            base, dense = float(str(row["over_base"])), 1 / float(str(row["over_dense"]))
            print(
                f"{row['dtype']}, base + {options.variants} variants at 1 bit: {base:.2f} of the base "
                f"(goal: at most {most}), {dense:.2f} times as fast as dense copies (goal: {faster})"
            )
    print(
        f"\n{'one tensor at load':<28} {'laid out, ms':>13} {'dense copy, ms':>15} {'bits held':>10}"
    )
    for row in loads:
        print(
            f"{row['case']:<28} {row['laid_out_ms']:>13.0f} {row['dense_ms']:>15.0f} "
            f"{row['bits_in_memory']:>10.2f}"
        )


if __name__ == "__main__":
    main()
