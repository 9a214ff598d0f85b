"""What other papers report of codecs, tried on the demo's fine-tunes, and told as it comes out here."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from quality_models import Measured, Task
from quality_tally import Shape, Tried, geometric, share

from deltafold.compress import Budget, DeltaRepo, Recipe, parse_spec
from deltafold.compress.calibration import LogitFit, compress_and_fit, decoded_tensors


def claims(tried: Tried, *, quick: bool) -> list[Shape]:
    """All of them."""
    if quick:
        return [more_bits(tried, ("bitdelta",)), dare_in_p(tried, (0.1, 0.9)), tables(tried)]
    every: list[Callable[[Tried], Shape]] = [
        more_bits,
        dare_in_p,
        tables,
        norms,
        distilled_scales,
        learned_factors,
        order_of_signs,
        ultradelta_steps,
        sparse_factors,
        mixed_widths,
        budget,
    ]
    return [one(tried) for one in every]


_LADDERS = {"bitdelta": (1, 2, 4), "int": (2, 4, 8), "codebook": (1, 2, 4), "lloyd": (1, 2, 4)}


def more_bits(tried: Tried, names: tuple[str, ...] = (*_LADDERS, "svd")) -> Shape:
    """Every further bit takes KL away, in every fine-tune."""
    told, held, count = [], 0, 0
    for name in names:
        specs = [f"{name}:bits={bits}" for bits in _LADDERS.get(name, (1, 2, 4))]
        rows = [[m.kl for m in tried.codecs(spec)] for spec in specs]
        for fewer, more in itertools.pairwise(rows):
            held += sum(a > b for a, b in zip(fewer, more, strict=True))
            count += len(fewer)
        told.append(f"{name} " + " > ".join(map(geometric, rows)))
    return Shape(
        "more bits",
        "2402.10193, section 3.3",
        "KL falls with bits",
        "; ".join(told),
        held,
        count,
    )


def dare_in_p(tried: Tried, rates: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)) -> Shape:
    """Dropping is free up to some rate, then ruins the model."""
    found = {p: tried.edits(f"dare:drop={p},seed={{seed}}") for p in rates}
    first, last = found[rates[0]], found[rates[-1]]
    held = sum(
        a.accuracy > 0.95 and b.accuracy < 0.5 * a.accuracy
        for a, b in zip(first, last, strict=True)
    )
    free = max((p for p, rows in found.items() if min(m.accuracy for m in rows) > 0.95), default=0)
    return Shape(
        "DARE in p",
        "2311.03099",
        "accuracy flat, then falling",
        ", ".join(f"p={p} {share(m.accuracy for m in rows)}" for p, rows in found.items())
        + f"; above 95 % in every trial up to p={free}",
        held,
        len(first),
    )


def tables(tried: Tried) -> Shape:
    """Without the delta of embedding and head."""
    found = _left_out(tried, "embed", "lm_head")
    return Shape(
        "tables left out",
        "release codes, which store them whole",
        "breaks (accuracy below half)",
        _told(tried, found),
        sum(m.accuracy < 0.5 for m in found),
        len(found),
    )


def norms(tried: Tried) -> Shape:
    """Without the delta of the norms."""
    found = _left_out(tried, "norm")
    return Shape(
        "norms left out",
        "DeltaZip's code, which takes the base's",
        "harmless (accuracy above 95 %)",
        _told(tried, found),
        sum(m.accuracy > 0.95 for m in found),
        len(found),
    )


def distilled_scales(tried: Tried) -> Shape:
    """Training the scales on logits recovers some of what one bit loses."""
    return _fitted(
        tried,
        "distilled scales",
        "2402.10193, section 3.1",
        "recovers (1 bit, 100 steps)",
        "bitdelta:bits=1",
        "scales",
    )


def learned_factors(tried: Tried) -> Shape:
    """Two numbers for the whole model, learned on logits."""
    return _fitted(
        tried,
        "two learned factors",
        "2505.11344",
        "recovers (shift-scale, 100 steps)",
        "shift-scale",
        "terms",
    )


def order_of_signs(tried: Tried) -> Shape:
    """D-QRELO: signs and then a low rank, against the other order."""
    told, held, count = [], 0, 0
    for rho in (0.0156, 0.0625):
        first = tried.codecs(f"d-qrelo:rho={rho}")
        other = tried.codecs(f"d-qrelo:rho={rho},first=svd")
        held += sum(a.kl < b.kl for a, b in zip(first, other, strict=True))
        count += len(first)
        pair = (geometric(m.kl for m in rows) for rows in (first, other))
        told.append(f"rho={rho} " + " / ".join(pair))
    return Shape(
        "signs before the low rank",
        "2604.16940",
        "better than the low rank first",
        "KL, signs first / low rank first: " + "; ".join(told),
        held,
        count,
    )


def ultradelta_steps(tried: Tried) -> Shape:
    """UltraDelta's steps one after the other: each gives the same quality or more."""
    told, held, count = [], 0, 0
    for drop in (0.6, 0.8):
        specs = {
            "DARE": f"dare:drop={drop}",
            "+ levels": f"quantize-and-drop:drop={drop}",
            "+ rates": f"ultradelta:drop={drop},gamma=1.0,step=0.02",
            "+ norms": f"ultradelta:drop={drop},step=0.02",
        }
        rows = {name: [m.kl for m in tried.codecs(spec)] for name, spec in specs.items()}
        for before, after in itertools.pairwise(rows.values()):
            held += sum(b <= a for a, b in zip(before, after, strict=True))
            count += len(before)
        steps = ", ".join(f"{name} {geometric(values)}" for name, values in rows.items())
        told.append(f"drop={drop}: {steps}")
    return Shape(
        "UltraDelta's steps",
        "2505.13563, ablation",
        "each step keeps or adds quality",
        "KL: " + "; ".join(told),
        held,
        count,
    )


def sparse_factors(tried: Tried) -> Shape:
    """ImPart against a plain low rank and DARE of the same size."""
    told, held, count = [], 0, 0
    for ratio, bits in ((16.0, 1), (8.0, 2)):
        rows = {
            "impart": tried.codecs(f"impart:ratio={ratio}"),
            "svd": tried.codecs(f"svd:bits={bits}"),
            "dare": tried.codecs(f"dare:drop={1 - bits / 16:g}"),
        }
        for name in ("svd", "dare"):
            held += sum(a.kl < b.kl for a, b in zip(rows["impart"], rows[name], strict=True))
            count += len(rows[name])
        told.append(
            f"{bits} bits: "
            + ", ".join(f"{n} {geometric(m.kl for m in r)}" for n, r in rows.items())
        )
    return Shape(
        "ImPart at equal size",
        "2504.13237, table 1",
        "better than low rank and DARE",
        "KL, " + "; ".join(told),
        held,
        count,
    )


def mixed_widths(tried: Tried) -> Shape:
    """Delta-CoMe against a plain low rank and one sign plane, at about one bit."""
    rows = {
        name: tried.codecs(spec)
        for name, spec in (
            ("delta-come", "delta-come:bits=1.0"),
            ("svd", "svd:bits=1"),
            ("bitdelta", "bitdelta:scale=tensor"),
        )
    }
    pairs = [
        (a.kl, b.kl)
        for name in ("svd", "bitdelta")
        for a, b in zip(rows["delta-come"], rows[name], strict=True)
    ]
    return Shape(
        "Delta-CoMe at one bit",
        "2406.08903, README",
        "better than low rank and BitDelta",
        "KL: " + ", ".join(f"{name} {geometric(m.kl for m in r)}" for name, r in rows.items()),
        sum(a < b for a, b in pairs),
        len(pairs),
    )


def budget(tried: Tried) -> Shape:
    """The planner against the same codec everywhere, at the same size."""
    told, held, count = [], 0, 0
    for spec in ("bitdelta:bits=1,group=64", "bitdelta:bits=2,group=64"):
        rows: list[tuple[float, float, float]] = []
        for task in tried.tasks:
            found, repo = tried.bench.pack(task, Recipe(default=parse_spec(spec)))
            size = str(repo.manifest.totals.delta_bytes)
            planned = Recipe(budget=Budget(size))
            blind = tried.bench.pack(task, planned)[0]
            seeing = tried.bench.pack(task, planned, evidence=task.fisher())[0]
            rows.append((found.kl, blind.kl, seeing.kl))
        held += sum(b < a for a, b, _ in rows) + sum(c < a for a, _, c in rows)
        count += 2 * len(rows)
        alike, blind_kl, seeing_kl = (geometric(v) for v in zip(*rows, strict=True))
        told.append(f"{spec}: alike {alike}, planned {blind_kl}, with gradients {seeing_kl}")
    return Shape(
        "a budget", "-", "planned better than alike", "KL: " + "; ".join(told), held, count
    )


def _fitted(
    tried: Tried,
    name: str,
    source: str,
    expected: str,
    spec: str,
    what: Literal["scales", "terms"],
) -> Shape:
    before, after = tried.codecs(spec), []
    for task in tried.tasks:
        with tempfile.TemporaryDirectory() as folder:
            report = compress_and_fit(
                tried.bench.base.folder,
                task.folder,
                Path(folder) / "delta",
                task.calibration,
                fit=LogitFit(steps=100, batch=16, what=what),
                recipe=Recipe(default=parse_spec(spec)),
            )
            tensors = decoded_tensors(tried.bench.base, DeltaRepo.open(report.out))
        after.append(tried.bench.measure(task, tensors))
    return Shape(
        name,
        source,
        expected,
        f"KL {geometric(m.kl for m in before)} to {geometric(m.kl for m in after)}, accuracy "
        f"{share(m.accuracy for m in before)} to {share(m.accuracy for m in after)}",
        sum(b.kl < a.kl for a, b in zip(before, after, strict=True)),
        len(before),
    )


def _left_out(tried: Tried, *words: str) -> list[Measured]:
    found = []
    for task in tried.tasks:
        tensors = tried.bench.tensors_of(task.source)
        for name in tensors:
            if any(word in name for word in words):
                tensors[name] = tried.bench.base.tensor(name)
        found.append(tried.bench.measure(task, tensors))
    return found


def _told(tried: Tried, found: list[Measured]) -> str:
    pairs: list[tuple[Task, Measured]] = list(zip(tried.tasks, found, strict=True))
    return ", ".join(f"{task.name} {m.accuracy:.0%}" for task, m in pairs)
