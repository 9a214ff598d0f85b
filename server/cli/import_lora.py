"""`deltafold import-lora`: a base and a PEFT LoRA in, a delta repo out."""

from __future__ import annotations

import time

import click

from deltafold.server.cli.command import command_line
from deltafold.server.cli.output import Output, output_options, quiet_option
from deltafold.server.cli.packed import pack_data, pack_text


@click.command("import-lora")
@click.argument("base")
@click.argument("lora")
@click.option("-o", "--out", required=True, help="The delta repo to write.")
@click.option(
    "--accept",
    metavar="WORD",
    multiple=True,
    help="Let a difference in structure through: new-tensors or tokenizer; repeat it for both.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing delta.")
@quiet_option
@output_options
@click.pass_obj
def import_lora(
    output: Output, base: str, lora: str, out: str, accept: tuple[str, ...], overwrite: bool
) -> None:
    """Write the PEFT adapter LORA as a delta against BASE.

    Its factors are kept as they are, in float32; what it stores whole is kept bit for bit. The delta
    shares batches with all others.

    \b
    deltafold import-lora Llama-3.1-8B ./sql-lora -o zoo/sql
    """
    from deltafold.compress import import_lora as run

    began = time.monotonic()
    with output.progress() as progress:
        report = run(
            base,
            lora,
            out,
            accept=accept,
            overwrite=overwrite,
            command=command_line("import-lora"),
            progress=progress,
        )
    seconds = time.monotonic() - began
    output.result(pack_data(report, seconds), pack_text(report, seconds))
