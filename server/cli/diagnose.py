"""`deltafold diagnose`: what codecs and edits would do to a fine-tune's loss, and where."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltafold.server.cli.calibration import read_references
from deltafold.server.cli.output import Output, output_options, quiet_option, table

if TYPE_CHECKING:
    from deltafold.compress.calibration.diagnosis import Diagnosis, Verdict

#: Judged if nobody says what: a cheap codec, the default, a random drop, an extrapolation.
_CODECS = ("bitdelta", "bitdelta:bits=4,group=128", "int:bits=4", "dare:drop=0.9")
_EDITS = ("scale:by=1.2",)
_STEPS = 5


@click.command("diagnose")
@click.argument("base")
@click.argument("variant")
@click.option(
    "--calibrate",
    metavar="FILE",
    required=True,
    help="Examples that the losses are measured on, as for `deltafold compress`.",
)
@click.option(
    "--calibrate-rows", metavar="N", type=int, default=64, show_default=True, help="Most rows used."
)
@click.option(
    "--calibrate-length",
    metavar="N",
    type=int,
    default=512,
    show_default=True,
    help="Most tokens of a row.",
)
@click.option(
    "--codec",
    "codecs",
    metavar="SPEC",
    multiple=True,
    help="A codec to judge, for every matrix; repeat it.",
)
@click.option("--edit", "edits", metavar="SPEC", multiple=True, help="An edit to judge; repeat it.")
@click.option(
    "--steps",
    metavar="C",
    type=int,
    default=_STEPS,
    show_default=True,
    help="Steps of the Riemann sum: more are closer to the loss difference, and slower.",
)
@click.option(
    "--group-size",
    metavar="SIZE",
    default="2GiB",
    show_default=True,
    help="Most memory for gradients, and for what codecs and edits learn of the data; smaller groups "
    "take more passes over it.",
)
@click.option(
    "--reference",
    "references",
    metavar="ROLE=MODEL",
    multiple=True,
    help="Another checkpoint for codecs and edits that look at one, as for `deltafold compress`.",
)
@click.option(
    "--safe", metavar="FILE", help="Harmful prompts with safe answers, for safe-delta and irr."
)
@click.option("--device", default="cpu", show_default=True, help="Where the models run.")
@click.option("-o", "--out", metavar="FILE", help="Also write a report with heat maps, as HTML.")
@quiet_option
@output_options
@click.pass_obj
def diagnose(
    output: Output,
    base: str,
    variant: str,
    calibrate: str,
    calibrate_rows: int,
    calibrate_length: int,
    codecs: tuple[str, ...],
    edits: tuple[str, ...],
    steps: int,
    group_size: str,
    references: tuple[str, ...],
    safe: str | None,
    device: str,
    out: str | None,
) -> None:
    """Tell which codecs and edits keep, harm or help the fine-tune VARIANT of BASE, and where.

    For each the loss difference to the fine-tune is measured, and split by tensor. Nothing is packed.

    \b
    deltafold diagnose Llama-3.1-8B ./sql-ft --calibrate sql.jsonl
    deltafold diagnose Llama-3.1-8B ./sql-ft --calibrate sql.jsonl \\
        --codec int:bits=2 --edit scale:by=1.3 -o report.html
    """
    from deltafold.compress.calibration import calibrate as calibrated
    from deltafold.compress.calibration.diagnosis import Diagnose
    from deltafold.compress.checkpoint import Checkpoint
    from deltafold.compress.sizes import parse_size

    began = time.monotonic()
    group_bytes = parse_size(group_size, "--group-size 2GiB")
    evidence = calibrated(
        base,
        variant,
        calibrate,
        rows=calibrate_rows,
        length=calibrate_length,
        references=read_references(references),
        safe=safe,
        device=device,
        group_bytes=group_bytes,
    )
    asked = (codecs, edits) if codecs or edits else (_CODECS, _EDITS)
    found = Diagnose(
        Checkpoint.open(base),
        evidence.source,
        evidence.data,
        evidence,
        steps=steps,
        group_bytes=group_bytes,
        device=device,
        progress=lambda spec: None if output.quiet else click.echo(f"judging {spec}", err=True),
    ).run(*asked)
    if out is not None:
        Path(out).write_text(report_html(found, variant, base), "utf-8")
    seconds = round(time.monotonic() - began, 3)
    output.result({**found.to_json(), "seconds": seconds}, _text(found))


def _text(found: Diagnosis) -> str:
    head = ["codec or edit", "class", "loss", "+-", "Riemann", "KL", "top-1", "hurts most"]
    rows = [_row(verdict) for verdict in found.verdicts]
    base = "unknown" if found.base_loss is None else f"{found.base_loss:.4g}"
    first = f"loss of the base {base}, of the fine-tune {found.loss:.4g} nats a token"
    return f"{first}\n\n{table(head, rows, 'loss +- Riemann KL top-1')}\n\n{_legend(found)}"


def _row(verdict: Verdict) -> list[str]:
    from deltafold.compress.calibration.riemann import worst

    highest = worst(verdict.terms, 1)
    return [
        verdict.spec,
        verdict.label,
        f"{verdict.difference:+.3g}",
        f"{verdict.tolerance:.2g}",
        f"{verdict.predicted:+.3g}",
        f"{verdict.found.kl:.3g}",
        f"{verdict.found.agreement:.1%}",
        f"{highest[0][0]} {highest[0][1]:+.2g}" if highest else "-",
    ]


def _legend(found: Diagnosis) -> str:
    from deltafold.compress.calibration.diagnosis import ERRORS, SHARE

    steps = found.verdicts[0].steps if found.verdicts else _STEPS
    return (
        "loss: the rise over the fine-tune's, by two forward passes. Within +- it counts as none\n"
        f"(competitive): {SHARE:.0%} of what the fine-tune gained over the base, or {ERRORS:g} standard"
        " errors,\nwhichever is more. Riemann: the same rise, summed over tensors from gradients at "
        f"{steps} points.\nA class describes these examples; it is no promise."
    )


def report_html(found: Diagnosis, variant: str, base: str) -> str:
    """A page that needs no other file: the table, and a heat map for each codec and edit."""
    from deltafold.compress.heatmap import heat_map

    title = html.escape(f"{Path(variant).name} against {Path(base).name}")
    head = ("codec or edit", "class", "loss", "+-", "Riemann", "KL", "top-1", "hurts most")
    rows = "\n".join(_html_row("td", _row(verdict)) for verdict in found.verdicts)
    maps = "\n".join(
        f"<h2>{html.escape(v.spec)}</h2>\n"
        + heat_map(v.terms, title=f"{v.spec}: loss by tensor, {v.label}", unit=" nats")
        for v in found.verdicts
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; }}
td, th {{ padding: 2px 12px 2px 0; text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
{_html_row("th", head)}
{rows}
</table>
<p>{html.escape(_legend(found))}</p>
<p>Red tensors raise the loss, blue ones lower it.</p>
{maps}
</body>
</html>
"""


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
