"""`deltafold eval`: how close a delta's model is to its fine-tune, written down in the delta."""

from __future__ import annotations

import time
from typing import Any

import click

from deltafold.server.cli.output import Output, facts, output_options, quiet_option


@click.command("eval")
@click.argument("delta")
@click.option("--base", required=True, help="The base that it was packed against.")
@click.option(
    "--against",
    required=True,
    metavar="VARIANT",
    help="The fine-tune itself: a checkpoint, or a lossless delta.",
)
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="Examples: .jsonl with text; prompt and completion; messages; or input_ids. Or a .txt file.",
)
@click.option(
    "--rows", metavar="N", type=int, default=64, show_default=True, help="Most rows used."
)
@click.option(
    "--length", metavar="N", type=int, default=512, show_default=True, help="Most tokens of a row."
)
@click.option("--device", default="cpu", show_default=True, help="Where the models run.")
@click.option("--dry-run", is_flag=True, help="Print the figures and leave the delta as it is.")
@quiet_option
@output_options
@click.pass_obj
def evaluate(
    output: Output,
    delta: str,
    base: str,
    against: str,
    data: str,
    rows: int,
    length: int,
    device: str,
    dry_run: bool,
) -> None:
    """Measure how DELTA's model answers beside the fine-tune, and record it in DELTA.

    The figures go to its manifest, its card and report/quality.json, and a server shows them. The
    delta's identity does not change.

    \b
    deltafold eval zoo/sql --base Llama-3.1-8B --against ./sql-ft --data held-out.jsonl
    """
    from deltafold.compress.calibration.judge import evaluate_delta
    from deltafold.compress.quality import record_quality
    from deltafold.compress.repo import DeltaRepo

    began = time.monotonic()
    found = evaluate_delta(base, delta, against, data, rows=rows, length=length, device=device)
    if not dry_run:
        record_quality(DeltaRepo.open(delta).folder, found)
    seconds = round(time.monotonic() - began, 3)
    result = {"delta": delta, "recorded": not dry_run, **found, "seconds": seconds}
    output.result(result, f"{delta}: {'measured' if dry_run else 'recorded'}\n{_text(found)}")


def _text(found: dict[str, Any]) -> str:
    data = found["data"]
    lines = [
        ("data", f"{data['name']}, {found['tokens']:,} tokens of {data['rows']} rows"),
        ("KL", f"{found['kl_mean']:.4g} nats a token"),
        ("same likeliest token", f"{found['top1_agreement']:.2%}"),
        ("loss", f"{found['loss']:.4g}, of the fine-tune {found['reference_loss']:.4g}"),
        (
            "perplexity",
            f"{found['perplexity']:.4g}, of the fine-tune {found['reference_perplexity']:.4g}",
        ),
    ]
    return facts(lines)
