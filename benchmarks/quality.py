"""Every codec and edit on really trained fine-tunes: size, error, KL, agreement, accuracy, cost.

    python benchmarks/quality.py [--quick] [--tasks A,B] [--json FILE] [--docs docs/quality.md]

The fine-tunes are those of `deltafold demo`, shipped bit for bit: a model of half a million parameters,
three layers, trained here to do one thing each. Figures are means over the tasks, on words that no
training has seen. What such a toy shows is the order of things, not how a large model would fare.

Codecs that need data get 64 words of the training split. Each codec packs the whole model: matrices,
embedding and head by its spec, vectors exactly. A second table tries what papers report, over all
fine-tunes, several rates and seeds. What `method_cost.py` measured on a GiB of tensors is put beside
the codecs where `--cost` names its file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality_claims import claims
from quality_models import Bench, Measured
from quality_shapes import shapes
from quality_specs import FAMILY_SPECS, QUICK_CANDIDATES, codec_specs, edit_specs
from quality_tally import Shape, Tried, edited, mean
from tables import put_between

from deltafold.compress import Budget, DeltafoldError, Recipe, parse_spec

MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"
TASKS = ("shout", "reverse", "no-vowels", "title", "rot13")


def main() -> None:
    """Measure, print, and write down."""
    options = _options()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    names = options.tasks.split(",")[: 1 if options.quick else None]
    bench = Bench(names, 16 if options.quick else options.words)
    rows = _rows(bench, quick=options.quick)
    tried = Tried(bench, (0,) if options.quick else (0, 1, 2))
    found = [*claims(tried, quick=options.quick), *shapes(tried, quick=options.quick)]
    result = {
        "machine": machine(),
        "tasks": names,
        "words": len(bench.tasks[0].held_out.rows),
        "rows": rows,
        "shapes": [dataclasses.asdict(s) for s in found],
        "seconds": round(time.perf_counter() - began, 1),
    }
    cost = json.loads(Path(options.cost).read_text("utf-8")) if options.cost else None
    text = markdown(result, cost)
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.docs:
        put_between(Path(options.docs), MARKS, text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few methods on one task")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--words", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--cost", help="what benchmarks/method_cost.py wrote, to stand beside")
    parser.add_argument("--docs", help="put the tables into this page, between its marks")
    return parser.parse_args()


def _rows(bench: Bench, *, quick: bool) -> list[dict[str, Any]]:
    nothing = [bench.measure(t, bench.tensors_of(bench.base), bits=0, ratio=0) for t in bench.tasks]
    rows = [_row("base", "no delta", "0", nothing)]
    for bits, spec in codec_specs(quick):
        rows.append(_measured(bench, "codec", spec, bits, lambda s: Recipe(default=parse_spec(s))))
    for bits in ("1",) if quick else ("1", "2", "4"):
        rows.append(_planned(bench, bits, QUICK_CANDIDATES if quick else ()))
    for spec, codec in () if quick or len(bench.tasks) < 2 else FAMILY_SPECS:
        named = f"{spec} --codec {codec}" if codec else spec
        rows.append(_row("family", named, "-", bench.family(spec, codec)))
    for spec in edit_specs(quick):
        rows.append(_measured(bench, "edit", spec, "-", edited))
    return rows


def _measured(bench: Bench, kind: str, spec: str, bits: str, recipe: Any) -> dict[str, Any]:
    print(f"{kind} {spec}", file=sys.stderr)
    try:
        chosen = recipe(spec)
        found = [bench.pack(task, chosen)[0] for task in bench.tasks]
    except DeltafoldError as error:
        return {"kind": kind, "spec": spec, "bits_wanted": bits, "note": error.message}
    except Exception as error:
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"kind": kind, "spec": spec, "bits_wanted": bits, "note": note}
    return _row(kind, spec, bits, found)


def _planned(bench: Bench, bits: str, candidates: tuple[str, ...]) -> dict[str, Any]:
    """A budget, with gradients, of the size that sign planes of so many bits take."""
    spec, found = f"bitdelta:bits={bits}", []
    for task in bench.tasks:
        _, repo = bench.pack(task, Recipe(default=parse_spec(spec)))
        size = str(repo.manifest.totals.delta_bytes)
        budget = Budget(size, candidates=tuple(map(parse_spec, candidates)))
        found.append(bench.pack(task, Recipe(budget=budget), evidence=task.fisher())[0])
    return _row("budget", f"--target-size of {spec}", bits, found)


def _row(kind: str, spec: str, bits: str, found: list[Measured]) -> dict[str, Any]:
    figures = dataclasses.asdict(mean(found))
    return {"kind": kind, "spec": spec, "bits_wanted": bits, **figures}


def machine() -> dict[str, str]:
    """What the figures depend on besides this code."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markdown(result: dict[str, Any], cost: dict[str, Any] | None = None) -> str:
    """Both tables."""
    machine_ = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    costs = {row["spec"]: row for row in cost["rows"]} if cost else {}
    lines = [
        f"`python benchmarks/quality.py`; {machine_}; {result['words']} unseen words of "
        f"{', '.join(result['tasks'])}; the run took {result['seconds']:.0f} s.",
        "",
        "| codec, budget, family or edit | bits a weight | error | KL | top-1 | accuracy | seconds | "
        "a GiB: CPU s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_quality_line(row, costs) for row in result["rows"]),
    ]
    noted = [f"* `{r['spec']}`: {r['note']}" for r in result["rows"] if "note" in r]
    lines += ["", "Not measured:", "", *noted] if noted else []
    lines += [
        "",
        "| what papers report | source | expected | found here | holds |",
        "|---|---|---|---|---|",
        *(_shape_line(Shape(**s)) for s in result["shapes"]),
    ]
    return "\n".join(lines)


def _quality_line(row: dict[str, Any], costs: dict[str, Any]) -> str:
    if "note" in row:
        return f"| {row['kind']} `{row['spec']}` | - | - | - | - | - | - | - | - |"
    bits = "-" if row["kind"] == "edit" else f"{row['bits']:.2f}"
    cost = costs.get(row["spec"]) if row["kind"] == "codec" else None
    paid = "- | -" if cost is None or cost["note"] else cost_cells(cost)
    return (
        f"| {row['kind']} `{row['spec']}` | {bits} | {row['rel_error']:.3f} | {row['kl']:.2g} | "
        f"{row['agreement']:.1%} | {row['accuracy']:.0%} | {row['seconds']:.2f} | {paid} |"
    )


def cost_cells(cost: dict[str, Any]) -> str:
    """CPU seconds a GiB, marked where a share was measured, and the peak of the process."""
    seconds = cost["cpu_seconds"] / cost["share"]
    mark = "" if cost["share"] == 1 else f" (from {cost['share']:.1%})"
    return f"{seconds:.0f}{mark} | {cost['peak_bytes'] / 2**20:.0f}"


def _shape_line(shape: Shape) -> str:
    cells = (shape.name, shape.source, shape.expected, shape.found, shape.verdict)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
