"""Codecs, edits, families and merges on trained fine-tunes: size, error, KL, accuracy, cost.

    python benchmarks/quality.py [--quick] [--tasks A,B] [--json FILE] [--docs docs/quality.md]
        [--cost FILE] [--from FILE]

The fine-tunes are those of `deltafold demo`, shipped bit for bit: a model of half a million parameters,
three layers, trained here to do one thing each. Figures are means over the tasks, on words that no
training has seen. What such a toy shows is the order of things, not how a large model would fare.

Codecs that need data get 64 words of the training split. Each codec packs the whole model: matrices,
embedding and head by its spec, vectors exactly. A second table tries what papers report, over all
fine-tunes, several rates and seeds. What `method_cost.py` measured on a GiB of tensors is put beside
the methods where `--cost` names its file: one spec of each name was, and stands beside all specs of it.

`--from` takes over what an earlier run's JSON holds and measures what it lacks; where it lacks nothing,
the tables are drawn again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality_claims import claims
from quality_models import Bench, Measured
from quality_shapes import shapes
from quality_specs import (
    QUICK_CANDIDATES,
    codec_specs,
    edit_specs,
    family_specs,
    merge_specs,
    name_of,
)
from quality_tally import Shape, Tried, edited, mean
from tables import put_between

from deltafold.compress import Budget, DeltafoldError, Recipe, parse_spec

MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"
TASKS = ("shout", "reverse", "no-vowels", "title", "rot13")


def main() -> None:
    """Measure, print, and write down."""
    options = _options()
    torch.set_num_threads(options.threads)
    known = json.loads(Path(options.source).read_text("utf-8")) if options.source else {}
    result = _run(options, known)
    cost = json.loads(Path(options.cost).read_text("utf-8")) if options.cost else None
    text = markdown(result, cost)
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.docs:
        put_between(Path(options.docs), MARKS, text)


def _run(options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    names = known.get("tasks") or options.tasks.split(",")[: 1 if options.quick else None]
    bench = Bench(names, known.get("words") or (16 if options.quick else options.words))
    began = time.perf_counter()
    rows = _rows(bench, known.get("rows", ()), quick=options.quick)
    found = known.get("shapes")
    if found is None:
        tried = Tried(bench, (0,) if options.quick else (0, 1, 2))
        every = [*claims(tried, quick=options.quick), *shapes(tried, quick=options.quick)]
        found = [dataclasses.asdict(s) for s in every]
    return {
        "machine": known.get("machine") or machine(),
        "tasks": names,
        "words": len(bench.tasks[0].held_out.rows),
        "rows": rows,
        "shapes": found,
        "seconds": round(known.get("seconds", 0) + time.perf_counter() - began, 1),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few methods on one task")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--words", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--cost", help="what benchmarks/method_cost.py wrote, to stand beside")
    parser.add_argument("--from", dest="source", help="JSON of an earlier run, taken over")
    parser.add_argument("--docs", help="put the tables into this page, between its marks")
    return parser.parse_args()


def _rows(bench: Bench, known: Sequence[dict[str, Any]], *, quick: bool) -> list[dict[str, Any]]:
    """All rows; those of an earlier run are taken as they are."""
    before = {(row["kind"], row["spec"], row["bits_wanted"]): row for row in known}
    return [
        before.get((kind, spec, bits)) or _measured(kind, spec, bits, run)
        for kind, spec, bits, run in _runs(bench, quick)
    ]


#: What measures one row on every task.
_Run = Callable[[], list[Measured]]


def _runs(bench: Bench, quick: bool) -> Iterator[tuple[str, str, str, _Run]]:
    """Kind, spec, bits a weight that are aimed at, and how to measure it."""

    def packed(recipe: Callable[[], Recipe]) -> _Run:
        return lambda: [bench.pack(task, recipe())[0] for task in bench.tasks]

    base = partial(bench.tensors_of, bench.base)
    yield (
        "base",
        "no delta",
        "0",
        lambda: [bench.measure(t, base(), bits=0, ratio=0) for t in bench.tasks],
    )
    for bits, spec in codec_specs(quick):
        yield "codec", spec, bits, packed(lambda spec=spec: Recipe(default=parse_spec(spec)))
    for bits in ("1",) if quick else ("1", "2", "4"):
        spec = f"bitdelta:bits={bits}"
        candidates = QUICK_CANDIDATES if quick else ()
        run = partial(_planned, bench, spec, candidates)
        yield "budget", f"--target-size of {spec}", bits, run
    if not quick and len(bench.tasks) > 1:
        for spec in family_specs():
            yield "family", spec, "-", partial(bench.family, spec)
        for spec in merge_specs():
            yield "merge", spec, "-", partial(bench.merge, spec)
    for spec in edit_specs(quick):
        yield "edit", spec, "-", packed(lambda spec=spec: edited(spec))


def _measured(kind: str, spec: str, bits: str, run: _Run) -> dict[str, Any]:
    print(f"{kind} {spec}", file=sys.stderr)
    try:
        found = run()
    except DeltafoldError as error:
        return {"kind": kind, "spec": spec, "bits_wanted": bits, "note": error.message}
    except Exception as error:
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"kind": kind, "spec": spec, "bits_wanted": bits, "note": note}
    figures = dataclasses.asdict(mean(found))
    return {"kind": kind, "spec": spec, "bits_wanted": bits, **figures}


def _planned(bench: Bench, spec: str, candidates: tuple[str, ...]) -> list[Measured]:
    """A budget, with gradients, of the size that a codec takes."""
    found = []
    for task in bench.tasks:
        _, repo = bench.pack(task, Recipe(default=parse_spec(spec)))
        size = str(repo.manifest.totals.delta_bytes)
        budget = Budget(size, candidates=tuple(map(parse_spec, candidates)))
        found.append(bench.pack(task, Recipe(budget=budget), evidence=task.fisher())[0])
    return found


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
    every = cost["rows"] if cost else []
    costs = {(row["kind"], name_of(row["spec"])): row for row in every if not row["note"]}
    lines = [
        f"`python benchmarks/quality.py`; {machine_}; {result['words']} unseen words of "
        f"{', '.join(result['tasks'])}; the run took {result['seconds']:.0f} s.",
        "",
        "| codec, budget, family, merge or edit | bits a weight | size | error | KL | top-1 | "
        "accuracy | seconds | a GiB: CPU s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
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


def _quality_line(row: dict[str, Any], costs: dict[tuple[str, str], Any]) -> str:
    if "note" in row:
        return f"| {row['kind']} `{row['spec']}` | - | - | - | - | - | - | - | - | - |"
    # What an edit alone leaves is kept in float32, so that its size says nothing.
    size = "- | -" if row["kind"] == "edit" else f"{row['bits']:.2f} | {row['ratio']:.1%}"
    cost = costs.get((row["kind"], name_of(row["spec"])))
    return (
        f"| {row['kind']} `{row['spec']}` | {size} | {row['rel_error']:.3f} | {row['kl']:.2g} | "
        f"{row['agreement']:.1%} | {row['accuracy']:.0%} | {row['seconds']:.2f} | "
        f"{cost_cells(cost) if cost else '- | -'} |"
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
