"""`deltafold restore`: a delta and its base in, a full checkpoint out."""

from __future__ import annotations

import time

import click

from deltafold.compress.sizes import human
from deltafold.server.cli.output import Output, facts, output_options, quiet_option


@click.command("restore")
@click.argument("delta")
@click.option("--base", required=True, help="The base that the delta was packed against.")
@click.option("-o", "--out", required=True, help="The checkpoint folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of all floating-point tensors; the fine-tune's own if left out.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@quiet_option
@output_options
@click.pass_obj
def restore(
    output: Output, delta: str, base: str, out: str, dtype: str | None, overwrite: bool
) -> None:
    """Write the fine-tune behind DELTA as an ordinary checkpoint.

    What was stored exactly comes back bit for bit, which is checked; the rest is the fine-tune as
    closely as its codec keeps it.

    \b
    deltafold restore zoo/sql --base Llama-3.1-8B -o sql-again
    """
    run_restore(output, delta, base, out, dtype, overwrite)


def run_restore(
    output: Output, delta: str, base: str, out: str, dtype: str | None, overwrite: bool
) -> None:
    """Restore and print the outcome; `deltafold export --to hf` does the same."""
    import torch

    from deltafold.compress import restore_checkpoint

    began = time.monotonic()
    with output.progress() as progress:
        report = restore_checkpoint(
            delta,
            base,
            out,
            dtype=getattr(torch, dtype) if dtype else None,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.monotonic() - began
    data = {
        "out": str(report.out),
        "tensors": report.tensors,
        "exact": report.exact,
        "bytes": report.nbytes,
        "dtype": dtype,
        "seconds": round(seconds, 3),
    }
    lines = [
        ("size", human(report.nbytes)),
        ("tensors", f"{report.tensors}, of which {report.exact} are the fine-tune's bit for bit"),
        ("took", f"{seconds:.1f} s"),
    ]
    output.result(data, f"{report.out}: written\n{facts(lines)}")
