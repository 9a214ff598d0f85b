"""The demo's result as text."""

from __future__ import annotations

from deltafold.server.demo.run import Result
from deltafold.server.demo.tasks import VARIANT_TASKS
from deltafold.server.demo.zoo import CODECS


def render(result: Result) -> str:
    """Three blocks: sample answers, the table, and speed."""
    return "\n\n".join([_samples(result), _table(result), _speed(result)])


def _samples(result: Result) -> str:
    columns = ["prompt", "base", *VARIANT_TASKS]
    lines = [
        f"The same prompts, one mixed batch (variants at {CODECS[1].label}):",
        "",
        "  " + "".join(f"{name:<12}" for name in columns),
    ]
    for sample in result.samples:
        lines.append("  " + "".join(f"{sample[name]:<12}" for name in columns))
    return "\n".join(line.rstrip() for line in lines)


def _table(result: Result) -> str:
    lines = [
        f"Right answers to {result.words} unseen words, and (in brackets) answers equal to the "
        "fine-tune's:",
        "",
        f"  {'variant':<11}{'base':>6}" + "".join(f"{c.label:>14}" for c in CODECS),
    ]
    for task in VARIANT_TASKS:
        cells = [result.cells[task][codec.label] for codec in CODECS]
        shown = "".join(f"{f'{c.match:.0%} ({c.agreement:.0%})':>14}" for c in cells)
        lines.append(f"  {task:<11}{result.base_match[task]:>6.0%}{shown}")
    sizes = [_mean_size(result, codec.label) for codec in CODECS]
    lines.append(f"  {'size':<11}{'':>6}" + "".join(f"{s:>14.1%}" for s in sizes))
    lines += [
        "",
        f"Size is every file of a delta over the {result.full_bytes:,} bytes of a full copy. The "
        "lossless column",
        "is the fine-tune itself, bit for bit.",
    ]
    return "\n".join(lines)


def _speed(result: Result) -> str:
    share = result.mixed / result.base_only
    return (
        f"{result.mixed:,.0f} tokens/s with {result.variants} variants in every batch, "
        f"{result.base_only:,.0f} with the base alone ({share:.0%})."
    )


def _mean_size(result: Result, label: str) -> float:
    sizes = [result.cells[task][label].size for task in VARIANT_TASKS]
    return sum(sizes) / len(sizes)
