"""A delta or a zoo as one HTML page with its pictures inside: no scripts, nothing fetched."""

from __future__ import annotations

import csv
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from deltafold.compress.durable import write_atomically
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.hub import resolve
from deltafold.compress.manifest import Manifest
from deltafold.compress.pictures import (
    Point,
    bars,
    bytes_by_kind,
    error_map,
    matrix,
    scatter,
    timeline,
)
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.sizes import human
from deltafold.compress.zoo_folder import delta_folders, is_delta
from deltafold.compress.zoo_list import list_zoo
from deltafold.compress.zoo_map import cosines

#: Figures of quality that can be drawn: name in `manifest.quality` -> what it is.
FIGURES: Final = {
    "kl_mean": "KL divergence to the fine-tune, nats a token",
    "top1_agreement": "share of tokens on which the fine-tune agrees",
}
#: The most that a figure can be.
_MOST: Final = {"top1_agreement": 1.0}
_CSS: Final = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:820px;margin:32px auto;padding:0 20px;
color:#1f2328;background:#f6f8fa}
h1{font-size:24px}h2{font-size:18px;margin-top:32px}code,pre{font:13px ui-monospace,monospace}
pre{background:#fff;padding:12px;border-radius:6px;overflow-x:auto}
table{border-collapse:collapse;background:#fff;border-radius:6px;display:block;overflow-x:auto;
width:fit-content;max-width:100%}
td,th{padding:5px 12px;text-align:left;border-bottom:1px solid #d1d9e0;overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
figure{margin:16px 0;overflow-x:auto}figcaption,.quiet{color:#59636e;font-size:13px}
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#010409}
pre,table{background:#0d1117}td,th{border-color:#3d444d}figcaption,.quiet{color:#9198a1}}
"""


@dataclass
class _Page:
    """A page that grows: its sections, and the pictures in it by name."""

    title: str
    sections: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)

    def head(self, words: str) -> None:
        self.sections.append(f"<h2>{html.escape(words)}</h2>")

    def note(self, words: str) -> None:
        self.sections.append(f'<p class="quiet">{html.escape(words)}</p>')

    def code(self, words: str) -> None:
        self.sections.append(f"<pre>{html.escape(words)}</pre>")

    def picture(self, name: str, drawn: str, caption: str) -> None:
        self.pictures[name] = drawn
        told = f"<figcaption>{html.escape(caption)}</figcaption>"
        self.sections.append(f"<figure>{drawn}{told}</figure>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> None:
        numbers = [' class="n"' if name in right.split() else "" for name in head]

        def row(tag: str, cells: Sequence[str]) -> str:
            made = (
                f"<{tag}{number}>{html.escape(cell)}</{tag}>"
                for cell, number in zip(cells, numbers, strict=True)
            )
            return f"<tr>{''.join(made)}</tr>"

        body = "".join(row("td", cells) for cells in rows)
        top = row("th", head) if any(name.strip() for name in head) else ""
        self.sections.append(f"<table>{top}{body}</table>")

    def html(self) -> str:
        title, body = html.escape(self.title), "\n".join(self.sections)
        return (
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_CSS}</style>\n<h1>{title}</h1>\n{body}\n</html>\n"
        )


def write_report(
    delta_or_zoo: str | Path, out: str | Path, *, svg_dir: str | Path | None = None
) -> tuple[Path, list[Path]]:
    """Write the page of a delta or a zoo, and its pictures on their own if asked for.

    Args:
        delta_or_zoo: a delta (folder or hub id), or a zoo's folder.
        out: the HTML file; replaced if there is one.
        svg_dir: folder for the pictures as SVG files.

    Returns:
        The page and the pictures that were written.

    Raises:
        DeltafoldError: `not-found`, `not-a-delta` or whatever is wrong with the delta;
            `bad-argument` where a file cannot be written.
    """
    folder = Path(delta_or_zoo).expanduser()
    is_zoo = folder.is_dir() and not is_delta(folder) and bool(delta_folders(folder))
    page = _zoo_page(folder) if is_zoo else _delta_page(DeltaRepo.open(resolve(delta_or_zoo)))
    place, drawn = Path(out).expanduser(), []
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, page.html())
        if svg_dir is not None:
            pictures = Path(svg_dir).expanduser()
            pictures.mkdir(parents=True, exist_ok=True)
            for name, text in page.pictures.items():
                write_atomically(pictures / f"{name}.svg", text)
                drawn.append(pictures / f"{name}.svg")
    except OSError as error:
        raise DeltafoldError(
            "bad-argument",
            f"{error.filename or place} cannot be written: {error.strerror}.",
            fix="choose another -o or --svg-dir",
        ) from error
    return place, drawn


def _delta_page(repo: DeltaRepo) -> _Page:
    manifest, totals = repo.manifest, repo.manifest.totals
    page = _Page(f"{manifest.variant.name}, a delta of {manifest.base.name}")
    page.table(
        ["", " "],
        [
            ["size", f"{human(totals.delta_bytes)}, {totals.ratio:.2%} of the fine-tune's "
             f"{human(totals.variant_bytes)}"],
            ["codec", manifest.codec_summary()],
            ["tensors", f"{len(manifest.tensors)} coded, {len(manifest.unchanged)} equal to the "
             f"base's; {totals.coverage:.0%} accounted for"],
            ["base", f"{manifest.base.name}  {manifest.base.fingerprint}"],
            ["delta", manifest.delta_id],
        ],
    )  # fmt: skip
    page.head("Where the bytes go")
    page.picture("bytes", bars({"delta": bytes_by_kind(manifest)}, title=human(totals.delta_bytes)),
                 "All files of the delta but the card, the report and the manifest.")  # fmt: skip
    _errors(page, manifest)
    _quality(page, manifest)
    _memory(page, repo.folder, totals.variant_bytes)
    page.head("How it was made")
    page.note(f"By {manifest.created_by}.")
    if manifest.command:
        page.code(manifest.command)
    page.code(yaml.safe_dump(manifest.recipe, sort_keys=False).strip())
    return page


def _errors(page: _Page, manifest: Manifest) -> None:
    page.head("What the codec misses")
    drawn = error_map(manifest)
    if drawn is None:
        page.note("Nothing: every tensor comes back bit for bit, or is stored without loss.")
        return
    page.picture("error", drawn, "Frobenius norm of what the terms miss, over the delta's own. "
                 "1 is as far off as the base.")  # fmt: skip
    worst = sorted(manifest.tensors.items(), key=lambda item: -item[1].rel_error)[:8]
    page.table(
        ["tensor", "stored as", "bytes", "error"],
        [
            [n, "+".join(str(t["id"]) for t in e.terms), f"{e.bytes:,}", f"{e.rel_error:.4f}"]
            for n, e in worst
        ],
        "bytes error",
    )


def _quality(page: _Page, manifest: Manifest) -> None:
    page.head("How well it answers")
    figures = {k: v for k, v in manifest.quality.items() if isinstance(v, int | float)}
    if figures:
        page.table(["figure", "value"], [[k, f"{v:.5g}"] for k, v in figures.items()], "value")
    else:
        page.note("It was not measured. `deltafold eval` compares it with the fine-tune.")
    points = _frontier(manifest)
    if len(points) > 1:
        unit = "KL, nats a token" if points[0].label == "kl" else _unit_of(manifest)
        shown = [Point("", p.ratio, p.value, p.chosen) for p in points]
        page.picture("frontier", scatter(shown, title="What other sizes would have given",
                     unit=unit), "The chosen size is the larger dot.")  # fmt: skip


def _frontier(manifest: Manifest) -> list[Point]:
    """Sizes that a budget's planner weighed up, where the manifest keeps them."""
    plan = manifest.quality.get("plan")
    rows = plan.get("frontier") if isinstance(plan, dict) else None
    return _points(rows, manifest) if isinstance(rows, list) else []


def _unit_of(manifest: Manifest) -> str:
    return f"error: {manifest.quality['plan'].get('error_unit', 'of the plan')}"


def _points(rows: list[Any], manifest: Manifest) -> list[Point]:
    sound = [r for r in rows if isinstance(r, dict) and _number(r.get("bytes")) > 0]
    kind = "kl" if sum("kl" in r for r in sound) > 1 else "error"
    sound = [r for r in sound if kind in r]
    size, whole = manifest.totals.delta_bytes, max(manifest.totals.variant_bytes, 1)
    near = min((abs(r["bytes"] - size) for r in sound), default=0)
    return [
        Point(kind, r["bytes"] / whole, _number(r[kind]), abs(r["bytes"] - size) == near)
        for r in sound
    ]


def _memory(page: _Page, folder: Path, variant_bytes: int) -> None:
    samples = memory_samples(folder / "report" / "memory.csv")
    if len(samples) > 1:
        page.head("Memory while packing")
        drawn = timeline(samples, title="Memory of the process", ceiling=variant_bytes)
        page.picture("memory", drawn, "Packing reads tensors as it goes; a flat line is the point.")


def memory_samples(path: Path) -> list[tuple[float, float]]:
    """(seconds, bytes) of a run, from a CSV file with these two columns; empty where there is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(float(row["seconds"]), float(row["bytes"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sorted(rows)


def _zoo_page(zoo: Path) -> _Page:
    listing = list_zoo(zoo)
    page = _Page(f"Variants of {zoo.resolve().name}")
    families = human(listing.families_bytes)
    page.note(
        f"{len(listing.members)} variants, {human(listing.disk_bytes)} on disk"
        + (f", {families} of it shared by families" if listing.families_bytes else "")
        + ("." if not listing.dangling else f". Aliases of nothing: {', '.join(listing.dangling)}.")
    )
    page.table(
        ["variant", "aliases", "size", "ratio", "codec", "id"],
        [
            [m.name, ", ".join(m.aliases), human(m.bytes),
             "" if m.ratio is None else f"{m.ratio:.2%}",
             m.codec if m.error is None else f"error: {m.error.code}", m.delta_id[7:15]]
            for m in listing.members
        ],
        "size ratio",
    )  # fmt: skip
    repos = {}
    for folder in delta_folders(zoo):
        try:
            repos[folder.name] = DeltaRepo.open(folder)
        except DeltafoldError as error:
            page.note(f"{folder.name}: {error.message}")
    page.head("Where the bytes go")
    drawn = bars(
        {n: bytes_by_kind(r.manifest) for n, r in repos.items()}, title="Bytes of each delta"
    )
    page.picture("bytes", drawn, "What deltas share on disk is counted for each of them.")
    names, values, tensors = cosines(repos)
    if names:
        page.head("Which deltas are alike")
        drawn = matrix(names, values, title="Cosine between deltas, as decoded")
        page.picture("map", drawn, f"On a sample of {len(tensors)} tensors. 1 is the same "
                     "direction, 0 none in common.")  # fmt: skip
    _zoo_quality(page, {name: repo.manifest for name, repo in repos.items()})
    return page


def _zoo_quality(page: _Page, manifests: Mapping[str, Manifest]) -> None:
    for figure, unit in FIGURES.items():
        points = [
            Point(name, m.totals.ratio, float(m.quality[figure]))
            for name, m in manifests.items()
            if _is_number(m.quality.get(figure)) and m.totals.ratio > 0
        ]
        if points:
            page.head(f"Size against {'KL divergence' if figure == 'kl_mean' else 'agreement'}")
            most = _MOST.get(figure, math.inf)
            drawn = scatter(points, title="One dot a variant", unit=unit, ceiling=most)
            page.picture(figure.replace("_", "-"), drawn, "As each delta's manifest has it; "
                         "figures of different data do not compare.")  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and _is_number(value) else 0.0
