"""What arXiv 2410.13841 reports of edits, tried on the demo's fine-tunes, told as it comes out here."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from quality_tally import Shape, Tried, geometric, share, spread

PAPER = "2410.13841"


def shapes(tried: Tried, *, quick: bool) -> list[Shape]:
    """All of them."""
    if quick:
        return [one_is_the_identity(tried)]
    every: list[Callable[[Tried], Shape]] = [
        one_is_the_identity,
        random_and_sign,
        random_and_gradient,
        gradient_ruins,
        interpolation,
        trim_and_drop,
        sampled,
        scaled_mean,
    ]
    return [one(tried) for one in every]


def one_is_the_identity(tried: Tried) -> Shape:
    """k = 1 changes nothing, whatever p and the seed."""
    found = [m for p in (0.1, 0.5, 0.9) for m in tried.edits(f"dare-k:k=1.0,p={p},seed={{seed}}")]
    worst = max(m.kl for m in found)
    held = sum(m.kl < 1e-9 for m in found)
    return Shape(
        "k = 1", f"{PAPER}, section 3", "the fine-tune", f"KL {worst:.1e} at most", held, len(found)
    )


#: Multipliers of table 1.
_FACTORS = (0.5, 0.7, 0.9, 1.1, 1.3, 1.5)


def random_and_sign(tried: Tried) -> Shape:
    """Table 1, its first two columns: a random mask, and one by the delta's sign."""
    told, held, count = [], 0, 0
    for k in _FACTORS:
        by_sign = {t.name: tried.edit(t, f"dare-k:k={k},mask=sign") for t in tried.tasks}
        for task in tried.tasks:
            for seed in tried.seeds:
                random = tried.edit(task, f"dare-k:k={k},p=0.5,seed={seed}")
                held += random.loss <= by_sign[task.name].loss
                count += 1
        random_, signed = (
            share(m.accuracy for m in rows)
            for rows in (tried.edits(f"dare-k:k={k},p=0.5,seed={{seed}}"), by_sign.values())
        )
        told.append(f"k={k} {random_} / {signed}")
    return Shape(
        "random against by sign",
        f"{PAPER}, table 1",
        "random flat, by sign a little lower",
        "accuracy, random / by sign: " + "; ".join(told),
        held,
        count,
    )


def random_and_gradient(tried: Tried) -> Shape:
    """Table 1, first and last column: the split by delta times gradient is far worse."""
    told, held, count = [], 0, 0
    for k in _FACTORS:
        for task in tried.tasks:
            worse = tried.edit(task, f"dare-k-gradient:k={k}").loss
            for seed in tried.seeds:
                held += tried.edit(task, f"dare-k:k={k},p=0.5,seed={seed}").loss < worse
                count += 1
        loss = [m.loss for m in tried.edits(f"dare-k-gradient:k={k}")]
        told.append(f"k={k} {geometric(loss)}")
    return Shape(
        "by gradient worse than random",
        f"{PAPER}, table 1",
        "at every k",
        "loss by gradient: " + "; ".join(told),
        held,
        count,
    )


def gradient_ruins(tried: Tried) -> Shape:
    """Table 1, last column by itself: next to nothing is right."""
    found = {k: tried.edits(f"dare-k-gradient:k={k}") for k in _FACTORS}
    broken = [m.accuracy < 0.5 for rows in found.values() for m in rows]
    told = "; ".join(f"k={k} {share(m.accuracy for m in rows)}" for k, rows in found.items())
    return Shape(
        "by gradient ruins",
        f"{PAPER}, table 1",
        "accuracy near 0 at every k",
        f"accuracy {told}",
        sum(broken),
        len(broken),
    )


def interpolation(tried: Tried) -> Shape:
    """Which side of 1 is better, at equal distance."""
    told, held, count = [], 0, 0
    for step in (0.05, 0.1, 0.2, 0.3):
        pairs = [
            (
                tried.edit(t, f"scale:by={1 - step:g}").loss,
                tried.edit(t, f"scale:by={1 + step:g}").loss,
            )
            for t in tried.tasks
        ]
        held += sum(low < high for low, high in pairs)
        count += len(pairs)
        low, high = (geometric(values) for values in zip(*pairs, strict=True))
        told.append(f"{1 - step:g} {low}, {1 + step:g} {high}")
    return Shape(
        "interpolation against extrapolation",
        f"{PAPER}, figure 7",
        "interpolation better on most sets",
        "loss: " + "; ".join(told),
        held,
        count,
    )


def trim_and_drop(tried: Tried) -> Shape:
    """Trimming without rescaling, against a random drop of the same share, rescaled."""
    told, held, count = [], 0, 0
    for drop in (0.3, 0.5, 0.7, 0.8, 0.9):
        won = tried_here = 0
        for task in tried.tasks:
            trim = tried.edit(task, f"trim:keep={1 - drop:g}").kl
            for seed in tried.seeds:
                won += trim > tried.edit(task, f"dare:drop={drop},seed={seed}").kl
                tried_here += 1
        held, count = held + won, count + tried_here
        trims = geometric(m.kl for m in tried.edits(f"trim:keep={1 - drop:g}"))
        drops = geometric(m.kl for m in tried.edits(f"dare:drop={drop},seed={{seed}}"))
        told.append(f"{drop:.0%} dropped: {trims} / {drops}, DARE better in {won} of {tried_here}")
    return Shape(
        "trim against DARE",
        f"{PAPER}, section 4",
        "trim decreased, DARE competitive",
        "KL, trim / DARE: " + "; ".join(told),
        held,
        count,
    )


def sampled(tried: Tried) -> Shape:
    """Magnitudes drawn at random, against the mean magnitude for all."""
    plain = {t.name: tried.edit(t, "sampled-magnitudes:spread=0") for t in tried.tasks}
    told, held, count = [f"constant {spread(m.kl for m in plain.values())}"], 0, 0
    for draw, width in itertools.product(("normal", "uniform"), (0.25, 0.5)):
        spec = f"sampled-magnitudes:draw={draw},spread={width},seed={{seed}}"
        for task, seed in itertools.product(tried.tasks, tried.seeds):
            found = tried.edit(task, spec.format(seed=seed))
            held += found.accuracy > plain[task.name].accuracy - 0.1
            count += 1
        told.append(f"{draw} {width} {spread(m.kl for m in tried.edits(spec))}")
    return Shape(
        "sampled magnitudes",
        f"{PAPER}, section 4.2",
        "like the constant (here: accuracy at most 10 points below)",
        "KL: " + "; ".join(told),
        held,
        count,
    )


def scaled_mean(tried: Tried) -> Shape:
    """The mean magnitude times c: where is it best?"""
    factors = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
    kl = {c: [m.kl for m in tried.codecs(f"bitdelta:scale=tensor,factor={c}")] for c in factors}
    best = [min(factors, key=lambda c: kl[c][number]) for number in range(len(tried.tasks))]
    return Shape(
        "scaled average magnitude",
        f"{PAPER}, section 4.2",
        "best near c = 1 (here: from 0.75 to 1.25)",
        "KL: "
        + "; ".join(f"c={c} {geometric(values)}" for c, values in kl.items())
        + "; best at "
        + ", ".join(f"{t.name} {c}" for t, c in zip(tried.tasks, best, strict=True)),
        sum(0.75 <= c <= 1.25 for c in best),
        len(best),
    )
