"""Pictures of deltas as SVG: where the bytes go, size against quality, memory over time."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from deltafold.compress import svg
from deltafold.compress.heatmap import heat_map
from deltafold.compress.manifest import Manifest
from deltafold.compress.sizes import human
from deltafold.compress.terms import term_from_config

_WIDTH: Final = 760
_LABEL: Final = 150
#: Parts of terms that are no weights but what it takes to read them.
_OVERHEAD: Final = ("scale", "unit", "index", "mask")
_MOST_KINDS: Final = len(svg.COLOURS)
_REST: Final = "everything else"


@dataclass(frozen=True, slots=True)
class Point:
    """A size that was tried: bytes as a share of the fine-tune's, and how well it did there."""

    label: str
    ratio: float
    value: float
    chosen: bool = False


def kind_of(name: str, dimensions: int) -> str:
    """What a tensor is, by its name and shape alone: `experts`, `norms`, a projection's name ..."""
    words = name.lower().split(".")
    last = words[-2] if len(words) > 1 and words[-1] in ("weight", "bias") else words[-1]
    if any("expert" in word for word in words):
        return "experts"
    if any("emb" in word or word in ("wte", "wpe") for word in words):
        return "embeddings"
    if last in ("lm_head", "embed_out", "score", "classifier", "output"):
        return "head"
    if dimensions < 2:
        return "norms" if "norm" in last or last.startswith("ln") else "biases and vectors"
    return last


def bytes_by_kind(manifest: Manifest) -> dict[str, int]:
    """Bytes of a delta's files by what they hold, the largest first; they add up to its size."""
    found: dict[str, int] = defaultdict(int)
    for name, entry in manifest.tensors.items():
        kind = kind_of(name, len(entry.shape))
        for config in entry.terms:
            term = term_from_config(config, where=name)
            for part, spec in term.parts(tuple(entry.shape)).items():
                last = part.rpartition(".")[2]
                small = any(word in last for word in _OVERHEAD)
                found["scales and indexes" if small else kind] += spec.nbytes
    payload = sum(found.values())
    files = {n: f.bytes for n, f in manifest.files.items()}
    written = sum(size for n, size in files.items() if n.endswith(".safetensors"))
    found["headers and digests"] = written - payload + files.get("base_tensors.json", 0)
    found["tokenizer and configuration"] = manifest.totals.delta_bytes - sum(found.values())
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return {kind: nbytes for kind, nbytes in ordered if nbytes > 0}


def error_map(manifest: Manifest) -> str | None:
    """What each tensor's terms miss of its delta, by layer and projection; None where nothing is.

    Of the experts of a layer the worst is shown.
    """
    errors: dict[str, float] = {}
    for name, entry in manifest.tensors.items():
        if entry.rel_error > 0 and math.isfinite(entry.rel_error):
            shown = re.sub(r"\.experts\.\d+\.", ".experts.worst.", name)
            errors[shown] = max(entry.rel_error, errors.get(shown, 0.0))
    if not errors:
        return None
    return heat_map(errors, title="Error of the delta, by tensor", deepest=1.0)


def bars(rows: Mapping[str, Mapping[str, int]], *, title: str) -> str:
    """Stacked bars of bytes, one a row, and what the colours mean.

    Args:
        rows: label -> kind -> bytes.
        title: above.
    """
    rows = _few_kinds(rows)
    totals = _totals(rows)
    kinds = sorted(totals, key=lambda kind: (kind == _REST, -totals[kind]))
    colour = {**dict(zip(kinds, svg.COLOURS, strict=False)), _REST: svg.GREY}
    most = max((sum(row.values()) for row in rows.values()), default=0) or 1
    left = _LABEL if len(rows) > 1 else 12
    scale = (_WIDTH - left - 90) / most
    parts, y = [], 40.0
    for label, row in rows.items():
        x, whole = float(left), sum(row.values())
        if len(rows) > 1:
            parts.append(svg.text(left - 8, y + 15, _cut(label), anchor="end"))
        for kind in kinds:
            nbytes = row.get(kind, 0)
            hint = f"{kind}: {human(nbytes)}, {nbytes / max(whole, 1):.1%}"
            if nbytes:
                parts.append(svg.rect(x, y, nbytes * scale, 22, colour[kind], hint))
            x += nbytes * scale
        parts.append(svg.text(x + 8, y + 15, human(whole), "quiet"))
        y += 30
    everything = sum(totals.values()) or 1
    y += 14
    for i, kind in enumerate(kinds):
        x, below = 12 + (i % 2) * _WIDTH / 2, y + i // 2 * 20
        share = f"{human(totals[kind])}, {totals[kind] / everything:.1%}"
        parts += [
            svg.rect(x, below - 10, 11, 11, colour[kind]),
            svg.text(x + 18, below, kind),
            svg.text(x + _WIDTH / 2 - 40, below, share, "quiet", "end"),
        ]
    return svg.document(_WIDTH, y + (len(kinds) + 1) // 2 * 20, title, parts)


def _totals(rows: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = defaultdict(int)
    for row in rows.values():
        for kind, nbytes in row.items():
            totals[kind] += nbytes
    return dict(totals)


def _few_kinds(rows: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """As many kinds as there are colours; the smallest become one."""
    totals = _totals(rows)
    kept = sorted(totals, key=lambda kind: -totals[kind])
    kept = kept if len(kept) <= _MOST_KINDS else kept[: _MOST_KINDS - 1]
    folded: dict[str, dict[str, int]] = {}
    for label, row in rows.items():
        folded[label] = defaultdict(int)
        for kind, nbytes in row.items():
            folded[label][kind if kind in kept else _REST] += nbytes
    return folded


def scatter(points: Sequence[Point], *, title: str, unit: str, ceiling: float = math.inf) -> str:
    """Sizes (logarithmic, in per cent of the fine-tune) against a figure of quality.

    Args:
        points: with sizes above zero.
        title: above.
        unit: what the values are.
        ceiling: the most that a value can be; the axis ends there at the latest.
    """
    height, left, right, top, bottom = 320, 70, 30, 54, 46
    logs = [math.log10(p.ratio) for p in points]
    low, high = min(logs) - 0.1, max(logs) + 0.1
    least, most = _range([p.value for p in points], ceiling)

    def place(ratio: float, value: float) -> tuple[float, float]:
        x = left + (math.log10(ratio) - low) / (high - low) * (_WIDTH - left - right)
        y = height - bottom - (value - least) / (most - least) * (height - top - bottom)
        return x, y

    parts = []
    for tick in svg.ticks(least, most):
        y = place(points[0].ratio, tick)[1]
        parts += [svg.line(left, y, _WIDTH - right, y)]
        parts += [svg.text(left - 8, y + 4, f"{tick:.3g}", "quiet", "end")]
    for share in _round_shares(low, high):
        x = place(share, least)[0]
        parts += [svg.line(x, top, x, height - bottom)]
        parts += [svg.text(x, height - bottom + 18, f"{share * 100:.3g}%", "quiet", "middle")]
    dots: list[tuple[float, float, str]] = []
    parts.append(svg.text(12, 40, unit, "quiet"))
    parts.append(svg.text(_WIDTH - right, height - 8, "size, of the fine-tune's", "quiet", "end"))
    for point in sorted(points, key=lambda p: p.chosen):
        x, y = place(point.ratio, point.value)
        hint = f"{point.ratio:.2%}, {point.value:.4g} {unit}"
        hint = f"{point.label}: {hint}" if point.label else hint
        colour = svg.COLOURS[4] if point.chosen else svg.COLOURS[0]
        parts.append(svg.dot(x, y, colour, hint, 6 if point.chosen else 4))
        dots.append((x, y, point.label))
    parts += _labels(dots, floor=height - bottom)
    return svg.document(_WIDTH, height, title, parts)


def timeline(samples: Sequence[tuple[float, float]], *, title: str, ceiling: float = 0) -> str:
    """Bytes of memory over seconds.

    Args:
        samples: (seconds, bytes), in order of time.
        title: above.
        ceiling: a size to compare with, such as the fine-tune's; drawn where it is above zero.
    """
    height, left, right, top, bottom = 260, 80, 24, 40, 40
    span = max(samples[-1][0] - samples[0][0], 1e-9)
    most = max(max(b for _, b in samples), ceiling) * 1.1 or 1.0
    unit = 1024 ** min(int(math.log(most, 1024)), 4)

    def place(seconds: float, nbytes: float) -> tuple[float, float]:
        x = left + (seconds - samples[0][0]) / span * (_WIDTH - left - right)
        return x, height - bottom - nbytes / most * (height - top - bottom)

    parts = []
    for tick in svg.ticks(0, most / unit):
        y = place(samples[0][0], tick * unit)[1]
        parts += [svg.line(left, y, _WIDTH - right, y)]
        parts += [svg.text(left - 8, y + 4, human(tick * unit), "quiet", "end")]
    for tick in svg.ticks(0, span):
        x = place(samples[0][0] + tick, 0)[0]
        parts += [svg.text(x, height - bottom + 18, f"{tick:.3g} s", "quiet", "middle")]
    parts.append(svg.curve([place(*s) for s in samples], height - bottom))
    if ceiling > 0:
        y = place(samples[0][0], ceiling)[1]
        parts.append(
            f'<line x1="{left}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{svg.COLOURS[4]}" stroke-dasharray="5 4"/>'
        )
        parts.append(svg.text(_WIDTH - right, y - 5, "size of the fine-tune", "quiet", "end"))
    return svg.document(_WIDTH, height, title, parts)


def _range(values: Sequence[float], ceiling: float) -> tuple[float, float]:
    """Room around some values; from zero where they are small beside their spread."""
    low, high = min(values), max(values)
    room = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    top = max(min(high + room, ceiling), high)
    return (0.0 if 0 <= low <= 2 * (high - low) else low - room), top


def _labels(dots: Sequence[tuple[float, float, str]], floor: float) -> list[str]:
    """Labels beside dots, each where it is in no other's way; left out where there is no room."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in dots]
    drawn = []
    for x, y, label in dots:
        width = 7.0 * len(label)
        for dx, dy in ((9, -5), (-9, -5), (9, 16), (-9, 16), (9, -20), (-9, -20), (9, 31)):
            left = x + dx if dx > 0 else x + dx - width
            box = (left, y + dy - 10, left + width, y + dy + 2)
            inside = box[0] > 0 and box[2] < _WIDTH and box[3] < floor
            free = inside and not any(_meet(box, other) for other in taken)
            if label and free:
                taken.append(box)
                drawn.append(svg.text(x + dx, y + dy, label, "", "start" if dx > 0 else "end"))
                break
    return drawn


def _meet(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def matrix(names: Sequence[str], values: Sequence[Sequence[float]], *, title: str) -> str:
    """A square of numbers between -1 and 1: blue towards 1, orange towards -1."""
    cell, left, top = 46, _LABEL, 46
    parts = []
    for i, name in enumerate(names):
        parts.append(svg.text(left - 8, top + cell * i + 27, _cut(name), anchor="end"))
        for j, value in enumerate(values[i]):
            x, y = left + cell * j, top + cell * i
            colour = svg.COLOURS[0] if value >= 0 else svg.COLOURS[4]
            cell_ = svg.rect(x, y, cell - 2, cell - 2, colour, f"{name}, {names[j]}: {value:.3f}")
            parts.append(f'<g opacity="{0.08 + 0.92 * min(abs(value), 1):.2f}">{cell_}</g>')
            parts.append(svg.text(x + cell / 2 - 1, y + 27, f"{value:.2f}", "", "middle"))
    for j, name in enumerate(names):
        label = svg.text(0, 0, _cut(name, 14), anchor="end")
        x, y = left + cell * j + 26, top + cell * len(names) + 14
        parts.append(f'<g transform="translate({x} {y}) rotate(-35)">{label}</g>')
    height = top + cell * len(names) + 90
    return svg.document(max(left + cell * len(names) + 20, 300), height, title, parts)


def _round_shares(low: float, high: float) -> list[float]:
    found = [m * 10.0**p for p in range(-6, 3) for m in (1, 2, 5)]
    shares = [s for s in found if low <= math.log10(s) <= high]
    if not shares:  # sizes that are close together
        return [round(10 ** ((low + high) / 2), 4)]
    return shares if len(shares) <= 8 else [s for s in shares if f"{s:e}"[0] == "1"]


def _cut(label: str, longest: int = 20) -> str:
    return label if len(label) <= longest else f"{label[: longest - 1]}…"
