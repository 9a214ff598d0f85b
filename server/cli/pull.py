"""`deltafold pull`: a delta from the hub."""

from __future__ import annotations

import click

from deltafold.compress.sizes import human
from deltafold.server.cli.output import Output, output_options, quiet_option


@click.command("pull")
@click.argument("reference", metavar="ORG/NAME")
@click.option("-o", "--out", help="The folder to write; NAME if left out.")
@click.option("--zoo", help="Put it into this zoo instead.")
@click.option("--name", help="With --zoo: the variant's name; NAME if left out.")
@click.option("--revision", help="Branch, tag or commit; ORG/NAME@REVISION says the same.")
@click.option("--overwrite", is_flag=True, help="Replace what has the name.")
@quiet_option
@output_options
@click.pass_obj
def pull(
    output: Output,
    reference: str,
    out: str | None,
    zoo: str | None,
    name: str | None,
    revision: str | None,
    overwrite: bool,
) -> None:
    """Fetch the delta ORG/NAME from the hub, verify it, and put it into a folder or a zoo.

    \b
    deltafold pull org/sql-delta --zoo zoo --name sql
    """
    if zoo is not None and out is not None:
        raise click.UsageError("give -o or --zoo, not both.")
    if name is not None and zoo is None:
        raise click.UsageError("--name goes with --zoo.")
    from deltafold.compress.hub_delta import pull as fetch

    with output.progress() as progress:
        got = fetch(
            reference,
            out,
            zoo=zoo,
            name=name,
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )
    data = {"path": str(got.folder), "delta_id": got.delta_id, "bytes": got.bytes}
    output.result(data, f"{got.folder}: fetched and verified, {human(got.bytes)}")
