"""`deltafold schema`: the manifest's JSON schema."""

from __future__ import annotations

import json

import click

from deltafold.server.cli.output import Output, output_options


@click.command("schema")
@output_options
@click.pass_obj
def schema(output: Output) -> None:
    """Print the JSON schema of delta_config.json. `docs/format.md` describes the rest.

    \b
    deltafold schema > delta_config.schema.json
    """
    from deltafold.compress import schema as manifest_schema

    data = manifest_schema()
    output.result(data, json.dumps(data, indent=2))
