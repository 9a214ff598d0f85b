"""One step's linear layers: the base alone, the base with many variants, and what else one could do.

    python benchmarks/kernels.py [--device cuda] [--models NAME ...] [--layers NAME ...]
                                 [--variants 1 8 64] [--forms NAME ...] [--quick] [--json FILE]

Each variant has one token in the batch (`--tokens` for more). All rows of a table come from one run:
random weights, every case captured into a CUDA graph of its own and replayed in turn, several copies
of the weights so that no cache holds them, results compared with float64. Layers that read the same
input (q, k and v; gate and up) are one merged layer, as engines run them. Printed are ratios of least
times to the base's for all layers of the model, and the share of the same run's copy bandwidth at
which packed weights were read; below them what moves memory alone, as a share of that bandwidth. The
JSON file is written after each layer and number of variants, so that a run cut short leaves what it
had; a case that fails, for want of memory say, is a row with the reason. On a CPU the forms of CPUs
run, in sizes that fit; with TRITON_INTERPRET=1 the GPU kernels are interpreted, which shows that they
are right and nothing about their speed. `decode_step.py` times whole steps.
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
from kernel_forms import FORMS, our_cases
from kernel_others import other_cases
from kernel_setting import Case, Setting
from linear import machine
from timing import copy_bandwidth, time_in_turn, why_not


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
ONE_BIT, BITDELTA = "base + 1 bit", "base + BitDelta's public kernel"
#: What the project wants of a GPU from 8 variants on.
SHARES = {ONE_BIT: 0.75, "base + 2 bits": 0.8, "base + 4 bits": 0.8}


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
    facts = machine(options.device)
    for model in options.models:
        for layer in MODELS[model]:
            if options.layers and layer.name not in options.layers:
                continue
            for variants in options.variants:
                rows += _measured(model, layer, variants, device, options)
                print(f"{model} {layer.name} {variants}", file=sys.stderr, flush=True)
                _write(options.json, facts, bandwidths, rows)
    # Once more: what changed meanwhile is not our kernels.
    bandwidths.append(copy_bandwidth(device, size))
    _write(options.json, facts, bandwidths, rows)
    copied = " and ".join(f"{found / 1e9:.0f}" for found in bandwidths)
    facts |= {"copy GB/s, before and after": copied}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for model in options.models:
        _print(model, [row for row in rows if row.model == model], max(bandwidths))
    if options.plots:
        from plots import plot_ratios

        for model in options.models:
            path = Path(options.plots) / f"kernels-{model}.svg"
            plot_ratios(model, ratios([r for r in rows if r.model == model]), path)


def _write(
    path: str | None, facts: dict[str, str], bandwidths: list[float], rows: list[Row]
) -> None:
    """All that is known so far, whole or not at all."""
    if not path:
        return
    result = {
        "machine": facts,
        "copy_bytes_per_s": max(bandwidths),
        "rows": [asdict(r) for r in rows],
    }
    half = Path(path + ".part")
    half.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    half.replace(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--layers", nargs="+", help="names of layers, all by default")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
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


def _measured(
    model: str, layer: Layer, variants: int, device: torch.device, options: argparse.Namespace
) -> list[Row]:
    """Rows of one layer and number of variants; what fails is a row too."""
    head = (model, layer.name, layer.count, variants, options.tokens)
    setting = Setting(layer.widths, layer.columns, variants, options.tokens, device)
    try:
        return _measure(head, setting, options)
    except Exception as error:  # the base's own weights or batch
        return [Row(*head, BASE, None, None, 0, 0, None, why_not(error))]
    finally:
        del setting
        if device.type == "cuda":
            # Graphs keep the memory of what they captured.
            gc.collect()
            torch.cuda.empty_cache()


def _measure(
    head: tuple[str, str, int, int, int], setting: Setting, options: argparse.Namespace
) -> list[Row]:
    own, refused = our_cases(setting, options.forms)
    others, more = other_cases(setting, options.bitdelta)
    refused |= more
    cases = [Case(BASE, setting.base), *own, *others]
    calls = {case.name: case.call for case in cases}
    times = time_in_turn(calls, setting.device, options.rounds)
    rows = []
    for case in cases:
        found = times[case.name]
        least, median, note, error = None, None, "", None
        if isinstance(found, str):
            note = found
        else:
            least, median = found
            error, note = _error(case)
        sizes = (case.packed_bytes, case.moved_bytes)
        rows.append(Row(*head, case.name, least, median, *sizes, error, note))
    return rows + [Row(*head, name, None, None, 0, 0, None, why) for name, why in refused.items()]


def _error(case: Case) -> tuple[float | None, str]:
    """A case's error, and why it is not known."""
    if case.error is None:
        return None, ""
    try:
        return case.error(), ""
    except Exception as error:  # float64 copies need memory
        return None, f"result not checked: {why_not(error)}"


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
    print(f"{'case':<44}{head}{'x dense':>9}{'error':>9}")
    for case in cases:
        own = [row for row in rows if row.case == case]
        line = "".join(
            f" {known[case][v]:>7.2f}" if v in known.get(case, {}) else f"{'-':>8}" for v in counts
        )
        both = [v for v in counts if v in known.get(case, {}) and v in known.get(DENSE, {})]
        dense = f"{known[case][both[-1]] / known[DENSE][both[-1]]:.2f}" if both else "-"
        errors = [row.error for row in own if row.error is not None]
        worst = f"{max(errors):.0e}" if errors else ""
        print(f"{case:<44}{line}{dense:>9}{worst:>9}")
        for note in sorted({row.note for row in own if row.note}):
            print(f"    note: {note}")
    print("packed weights read, as a share of the copy's speed (goals from V=8 on)")
    for case in cases:
        shares = {v: _share(rows, case, bandwidth, v) for v in counts}
        if any(shares.values()):
            line = "".join("       -" if s is None else f"{s:>8.0%}" for s in shares.values())
            goal = f"  goal {SHARES[case]:.0%}" if case in SHARES else ""
            print(f"{case:<44}{line}{goal}")
    _print_bitdelta(rows, counts)
    _print_moved([row for row in rows if row.moved_bytes], bandwidth)


def _print_bitdelta(rows: list[Row], counts: list[int]) -> None:
    """How much longer BitDelta's kernel takes than ours for the same deltas."""
    found = {}
    for v in counts:
        ours, theirs = (_beyond(rows, case, v) for case in (ONE_BIT, BITDELTA))
        if ours and theirs:
            found[v] = theirs / ours
    if found:
        line = ", ".join(f"V={v} {ratio:.1f}" for v, ratio in found.items())
        print(f"BitDelta's kernel takes so many times as long as ours at 1 bit: {line} (goal 8)")


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
            print(f"    note: {note}")


def _beyond(rows: list[Row], case: str, variants: int) -> float | None:
    """Milliseconds beyond the base's, of the layers in which a case ran."""
    base = {r.layer: r.least for r in rows if r.case == BASE and r.variants == variants}
    own = [r for r in rows if r.case == case and r.variants == variants]
    found = [(r.least - (base[r.layer] or 0)) * r.count for r in own if r.least is not None]
    return sum(found) if found and sum(found) > 0 else None


def _share(rows: list[Row], case: str, bandwidth: float, variants: int) -> float | None:
    """Packed bytes by the time beyond the base's, as a share of copy speed."""
    own = [r for r in rows if r.case == case and r.variants == variants and r.packed_bytes]
    read = sum(r.packed_bytes * r.count for r in own if r.least is not None)
    beyond = _beyond(rows, case, variants)
    return read / (beyond * 1e-3) / bandwidth if read and beyond else None


if __name__ == "__main__":
    main()
