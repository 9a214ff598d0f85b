"""One step's linear layers: the base alone, the base with many variants, and what else one could do.

    python benchmarks/kernels.py [--device cuda] [--models NAME ...] [--variants 1 8 64] [--quick]

Each variant has one token in the batch (`--tokens` for more). All rows of a table come from one run:
random weights, every case captured into a CUDA graph of its own and replayed in turn, several copies
of the weights so that no cache holds them, results compared with float64. Printed are ratios of least
times to the base's for all layers of the model, and the share of the same run's copy bandwidth at
which packed weights were read. On a CPU the forms of CPUs run, in sizes that fit; with
TRITON_INTERPRET=1 the GPU kernels are interpreted, which shows that they are right and nothing about
their speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kernel_cases import Setting, make_cases
from linear import machine
from timing import copy_bandwidth, time_in_turn


@dataclass(frozen=True)
class Layer:
    """A linear layer `[rows, columns]` that a model has `count` times."""

    name: str
    rows: int
    columns: int
    count: int


MODELS = {
    "llama-3.1-8b": (
        Layer("qkv", 6144, 4096, 32),
        Layer("o", 4096, 4096, 32),
        Layer("gate_up", 28672, 4096, 32),
        Layer("down", 4096, 14336, 32),
        Layer("head", 128256, 4096, 1),
    ),
    "qwen2.5-7b": (
        Layer("qkv", 4608, 3584, 28),
        Layer("o", 3584, 3584, 28),
        Layer("gate_up", 37888, 3584, 28),
        Layer("down", 3584, 18944, 28),
        Layer("head", 152064, 3584, 1),
    ),
    "small": (Layer("square", 1024, 1024, 2), Layer("down", 512, 2048, 1)),
    "tiny": (Layer("square", 48, 80, 2), Layer("down", 32, 96, 1)),
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
    error: float | None
    note: str


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.manual_seed(0)
    device = torch.device(options.device)
    bandwidth = copy_bandwidth(device, 2**24 if options.quick else 2**30)
    rows: list[Row] = []
    for model in options.models:
        for layer in MODELS[model]:
            for variants in options.variants:
                rows += _measure(model, layer, variants, device, options)
                print(f"{model} {layer.name} {variants}", file=sys.stderr, flush=True)
    facts = machine(options.device) | {"copy GB/s": f"{bandwidth / 1e9:.0f}"}
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
    setting = Setting(layer.rows, layer.columns, variants, options.tokens, device)
    cases, refused = make_cases(setting, options.bitdelta)
    times = time_in_turn({case.name: case.call for case in cases}, device, options.rounds)
    rows = []
    for case in cases:
        found = times[case.name]
        least, median = found if not isinstance(found, str) else (None, None)
        error = case.error() if case.error is not None and not isinstance(found, str) else None
        note = found if isinstance(found, str) else ""
        rows.append(
            Row(
                *(model, layer.name, layer.count, variants, options.tokens, case.name),
                *(least, median, case.packed_bytes, error, note),
            )
        )
    for name, why in refused.items():
        rows.append(
            Row(
                *(model, layer.name, layer.count, variants, options.tokens, name),
                *(None, None, 0, None, why),
            )
        )
    return rows


def ratios(rows: list[Row]) -> dict[str, dict[int, float]]:
    """Time of all layers by case and number of variants, over the base's; only complete cases."""
    totals: dict[tuple[str, int], float] = defaultdict(float)
    seen: dict[tuple[str, int], set[str]] = defaultdict(set)
    for row in rows:
        if row.least is not None:
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
    cases = list(dict.fromkeys(row.case for row in rows))
    head = "".join(f"{f'V={v}':>8}" for v in counts)
    print(f"\n{model}: all linear layers, times over the base's own")
    print(f"{'case':<44}{head}{'x dense':>9}{'share':>7}{'error':>9}")
    for case in cases:
        own = [row for row in rows if row.case == case]
        line = "".join(
            f"{known[case][v]:>8.2f}" if v in known.get(case, {}) else f"{'-':>8}" for v in counts
        )
        both = [v for v in counts if v in known.get(case, {}) and v in known.get(DENSE, {})]
        dense = f"{known[case][both[-1]] / known[DENSE][both[-1]]:.2f}" if both else "-"
        errors = [row.error for row in own if row.error is not None]
        worst = f"{max(errors):.0e}" if errors else ""
        print(f"{case:<44}{line}{dense:>9}{_share(rows, case, bandwidth):>7}{worst:>9}")
        notes = sorted({row.note for row in own if row.note})
        for note in notes:
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
