"""`deltafold import-blocks`: a base and steps on its rows and columns in, a delta repo out."""

from __future__ import annotations

import time

import click

from deltafold.server.cli.command import command_line
from deltafold.server.cli.output import Output, output_options, quiet_option
from deltafold.server.cli.packed import pack_data, pack_text


@click.command("import-blocks")
@click.argument("base")
@click.argument("file")
@click.option("-o", "--out", required=True, help="The delta repo to write.")
@click.option("--overwrite", is_flag=True, help="Replace an existing delta.")
@quiet_option
@output_options
@click.pass_obj
def import_blocks(output: Output, base: str, file: str, out: str, overwrite: bool) -> None:
    """Write FILE's steps on rows and columns of BASE as a delta.

    FILE is a safetensors file with TENSOR.rows.index and TENSOR.rows.values, or the same for columns,
    made by something else; the values are added to the base's.

    \b
    deltafold import-blocks Llama-2-7b transferred.safetensors -o zoo/math
    """
    from deltafold.compress.blocks import import_blocks as run

    began = time.monotonic()
    with output.progress() as progress:
        report = run(
            base,
            file,
            out,
            overwrite=overwrite,
            command=command_line("import-blocks"),
            progress=progress,
        )
    seconds = time.monotonic() - began
    output.result(pack_data(report, seconds), pack_text(report, seconds))
