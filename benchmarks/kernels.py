"""One step's linear layers: the base alone, the base with many variants, and what else one could do.

    python benchmarks/kernels.py [--device cuda] [--models NAME ...] [--variants 1 8 64] [--quick]

Each variant has one token in the batch (`--tokens` for more). All rows of a table come from one run:
random weights, every case captured into a CUDA graph of its own and replayed in turn, several copies
of the weights so that no cache holds them, results compared with float64. Layers that read the same
input (q, k and v; gate and up) are one merged layer, as engines run them. Printed are ratios of least
times to the base's for all layers of the model, and the share of the same run's copy bandwidth at
which packed weights were read; below them what moves memory alone, as a share of that bandwidth. On a
CPU the forms of CPUs run, in sizes that fit; with TRITON_INTERPRET=1 the GPU kernels are interpreted,
which shows that they are right and nothing about their speed. `decode_step.py` times whole steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kernel_forms import our_cases
from kernel_others import other_cases
from kernel_setting import Case, Setting
from linear import machine
from timing import copy_bandwidth, time_in_turn


@dataclass(frozen=True)
class Layer:
    """A linear layer that a model has `count` times: rows of its parts, and columns."""

    name: str
    widths: tuple[int, ...]
    columns: int
    count: int


MODELS = {
    "llama-3.1-8b": (
        Layer("qkv", (4096, 1024, 1024), 4096, 32),
        Layer("o", (4096,), 4096, 32),
        Layer("gate_up", (14336, 14336), 4096, 32),
        Layer("down", (4096,), 14336, 32),
        Layer("head", (128256,), 4096, 1),
    ),
    "qwen2.5-7b": (
        Layer("qkv", (3584, 512, 512), 3584, 28),
        Layer("o", (3584,), 3584, 28),
        Layer("gate_up", (18944, 18944), 3584, 28),
        Layer("down", (3584,), 18944, 28),
        Layer("head", (152064,), 3584, 1),
    ),
    "small": (Layer("qkv", (512, 256, 256), 1024, 2), Layer("down", (512,), 2048, 1)),
    "tiny": (Layer("qkv", (24, 16, 8), 80, 2), Layer("down", (32,), 96, 1)),
}
BASE, DENSE = "base alone", "dense copies, a product each"


@dataclass(frozen=True)
class Row:
    """One case of one layer; times in milliseconds for one call."""

    model: str
    layer: str
    count: int
    variants: int
    tokens: int
    case: str
    least: float | None
    median: float | None
    packed_bytes: int
    moved_bytes: int
    error: float | None
    note: str


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.manual_seed(0)
    device = torch.device(options.device)
    size = 2**24 if options.quick or device.type == "cpu" else 2**30
    bandwidths = [copy_bandwidth(device, size)]
    rows: list[Row] = []
    for model in options.models:
        for layer in MODELS[model]:
            for variants in options.variants:
                rows += _measure(model, layer, variants, device, options)
                print(f"{model} {layer.name} {variants}", file=sys.stderr, flush=True)
    # Once more: what changed meanwhile is not our kernels.
    bandwidths.append(copy_bandwidth(device, size))
    bandwidth = max(bandwidths)
    copied = " and ".join(f"{found / 1e9:.0f}" for found in bandwidths)
    facts = machine(options.device) | {"copy GB/s, before and after": copied}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for model in options.models:
        _print(model, [row for row in rows if row.model == model], bandwidth)
    if options.json:
        result = {
            "machine": facts,
            "copy_bytes_per_s": bandwidth,
            "rows": [asdict(r) for r in rows],
        }
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.plots:
        from plots import plot_ratios

        for model in options.models:
            path = Path(options.plots) / f"kernels-{model}.svg"
            plot_ratios(model, ratios([r for r in rows if r.model == model]), path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", type=int)
    parser.add_argument("--tokens", type=int, default=1, help="of each variant; many are a prefill")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="tiny layers, one round")
    parser.add_argument("--bitdelta", action="store_true", help="fetch BitDelta's public kernel")
    parser.add_argument("--json")
    parser.add_argument("--plots", help="folder for SVG plots; needs matplotlib")
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    if options.quick:
        options.rounds = 1
    options.models = options.models or (
        ["tiny"] if options.quick else ["llama-3.1-8b", "qwen2.5-7b"] if on_gpu else ["small"]
    )
    options.variants = options.variants or (
        [1, 2] if options.quick else [1, 2, 4, 8, 16, 32, 64] if on_gpu else [1, 4, 8]
    )
    return options


def _measure(
    model: str, layer: Layer, variants: int, device: torch.device, options: argparse.Namespace
) -> list[Row]:
    setting = Setting(layer.widths, layer.columns, variants, options.tokens, device)
    cases = [Case(BASE, setting.base), *our_cases(setting)]
    more, refused = other_cases(setting, options.bitdelta)
    cases += more
    times = time_in_turn({case.name: case.call for case in cases}, device, options.rounds)
    head = (model, layer.name, layer.count, variants, options.tokens)
    rows = []
    for case in cases:
        found = times[case.name]
        ran = not isinstance(found, str)
        least, median = found if not isinstance(found, str) else (None, None)
        error = case.error() if case.error is not None and ran else None
        note = found if isinstance(found, str) else ""
        sizes = (case.packed_bytes, case.moved_bytes)
        rows.append(Row(*head, case.name, least, median, *sizes, error, note))
    rows += [Row(*head, name, None, None, 0, 0, None, why) for name, why in refused.items()]
    del cases, more
    if device.type == "cuda":
        # Graphs keep the memory of what they captured.
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def ratios(rows: list[Row]) -> dict[str, dict[int, float]]:
    """Time of all layers by case and number of variants, over the base's; only complete cases, and
    none that moves memory alone.
    """
    totals: dict[tuple[str, int], float] = defaultdict(float)
    seen: dict[tuple[str, int], set[str]] = defaultdict(set)
    for row in rows:
        if row.least is not None and not row.moved_bytes:
            totals[row.case, row.variants] += row.least * row.count
            seen[row.case, row.variants].add(row.layer)
    layers = {row.layer for row in rows}
    found: dict[str, dict[int, float]] = {}
    for (case, variants), total in totals.items():
        if seen[case, variants] == layers:
            base = totals[BASE, variants]
            found.setdefault(case, {})[variants] = total / base
    return found


def _print(model: str, rows: list[Row], bandwidth: float) -> None:
    counts = sorted({row.variants for row in rows})
    known = ratios(rows)
    cases = list(dict.fromkeys(row.case for row in rows if not row.moved_bytes))
    head = "".join(f"{f'V={v}':>8}" for v in counts)
    print(f"\n{model}: all linear layers, times over the base's own")
    print(f"{'case':<44}{head}{'x dense':>9}{'share':>7}{'error':>9}")
    for case in cases:
        own = [row for row in rows if row.case == case]
        line = "".join(
            f" {known[case][v]:>7.2f}" if v in known.get(case, {}) else f"{'-':>8}" for v in counts
        )
        both = [v for v in counts if v in known.get(case, {}) and v in known.get(DENSE, {})]
        dense = f"{known[case][both[-1]] / known[DENSE][both[-1]]:.2f}" if both else "-"
        errors = [row.error for row in own if row.error is not None]
        worst = f"{max(errors):.0e}" if errors else ""
        print(f"{case:<44}{line}{dense:>9}{_share(rows, case, bandwidth):>7}{worst:>9}")
        notes = sorted({row.note for row in own if row.note})
        for note in notes:
            print(f"    not run: {note}")
    _print_moved([row for row in rows if row.moved_bytes], bandwidth)


def _print_moved(rows: list[Row], bandwidth: float) -> None:
    """Cases that read and write memory: their speed as a share of the copy's."""
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        ran = [row for row in own if row.least is not None]
        seconds = sum((row.least or 0) * 1e-3 * row.count for row in ran)
        share = sum(row.moved_bytes * row.count for row in ran) / seconds / bandwidth if ran else 0
        errors = [row.error for row in own if row.error is not None]
        worst = f", largest error {max(errors):.0e}" if errors else ""
        print(f"{case}: {share:.0%} of copy speed{worst}")
        for note in sorted({row.note for row in own if row.note}):
            print(f"    not run: {note}")


def _share(rows: list[Row], case: str, bandwidth: float) -> str:
    """Packed bytes by the time beyond the base's, as a share of copy speed; at most variants."""
    most = max(row.variants for row in rows)
    base = {r.layer: r.least for r in rows if r.case == BASE and r.variants == most}
    own = [r for r in rows if r.case == case and r.variants == most and r.packed_bytes]
    own = [r for r in own if r.least is not None]
    beyond = sum((r.least - (base[r.layer] or 0)) * r.count for r in own if r.least is not None)
    if not own or beyond <= 0:
        return "-"
    read = sum(r.packed_bytes * r.count for r in own)
    return f"{read / (beyond * 1e-3) / bandwidth:.0%}"


if __name__ == "__main__":
    main()
