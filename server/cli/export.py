"""`deltafold export`: a delta and its base in, a folder for other programs out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from deltafold.compress.sizes import human
from deltafold.server.cli.output import (
    Output,
    facts,
    output_options,
    quiet_option,
    table,
)
from deltafold.server.cli.restore import run_restore

if TYPE_CHECKING:
    from deltafold.compress import ExportReport

_RANK = 16


@click.command("export")
@click.argument("delta")
@click.option("--base", required=True, help="The base that the delta was packed against.")
@click.option(
    "--to",
    "kind",
    required=True,
    type=click.Choice(["hf", "peft"]),
    help="hf: a full checkpoint, as restore writes it. peft: a LoRA folder.",
)
@click.option("-o", "--out", required=True, help="The folder to write.")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help=f"peft: most factors of a matrix; {_RANK} if left out.",
)
@click.option(
    "--drop",
    metavar="PATTERN",
    multiple=True,
    help="peft: leave the tensors out whose names match, which changes the model; repeat it.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="hf: dtype of all floating-point tensors; the fine-tune's own if left out.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint or LoRA folder.")
@quiet_option
@output_options
@click.pass_obj
def export(
    output: Output,
    delta: str,
    base: str,
    kind: str,
    out: str,
    rank: int | None,
    drop: tuple[str, ...],
    dtype: str | None,
    overwrite: bool,
) -> None:
    """Write DELTA for programs that do not know deltas.

    As a LoRA folder, matrices become factors of the given rank, which loses what a small rank cannot
    hold; the error of each is printed. A delta that came from a LoRA keeps its factors. Embeddings,
    output layers and norms are stored whole.

    \b
    deltafold export zoo/sql --base Llama-3.1-8B --to peft --rank 64 -o sql-lora
    deltafold export zoo/sql --base Llama-3.1-8B --to hf -o sql-again
    """
    if kind == "hf":
        _refuse(bool(drop) or rank is not None, "--rank and --drop are for --to peft.")
        run_restore(output, delta, base, out, dtype, overwrite)
        return
    _refuse(dtype is not None, "--dtype is for --to hf; factors are float32.")
    from deltafold.compress import export_peft

    began = time.monotonic()
    with output.progress() as progress:
        report = export_peft(
            delta,
            base,
            out,
            rank=rank or _RANK,
            drop=drop,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.monotonic() - began
    output.result(_data(report, seconds), _text(report, seconds))


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        from deltafold.compress import DeltafoldError

        raise DeltafoldError("bad-argument", message, fix="leave it out, or choose the other --to")


def _data(report: ExportReport, seconds: float) -> dict[str, Any]:
    return {
        "out": str(report.out),
        "to": "peft",
        "rank": report.rank,
        "bytes": report.nbytes,
        "rel_error": report.rel_error,
        "dropped": report.of("dropped"),
        "tensors": [
            {"tensor": t.tensor, "kind": t.kind, "rank": t.rank, "rel_error": t.rel_error}
            for t in report.tensors
        ],
        "seconds": round(seconds, 3),
    }


def _text(report: ExportReport, seconds: float) -> str:
    rows = [
        [t.tensor, t.kind, str(t.rank or "-"), f"{t.rel_error:.4f}"]
        for t in sorted(report.tensors, key=lambda t: -t.rel_error)
    ]
    lines = [
        ("size", human(report.nbytes)),
        ("error", f"{report.rel_error:.4f} of the whole delta"),
        ("took", f"{seconds:.1f} s"),
    ]
    dropped = report.of("dropped")
    if dropped:
        lines.insert(2, ("dropped", f"{len(dropped)} tensors, which stay as in the base"))
    listed = table(["tensor", "stored as", "rank", "error"], rows, "rank error")
    return f"{listed}\n{report.out}: written\n{facts(lines)}"
