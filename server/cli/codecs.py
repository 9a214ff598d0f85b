"""`deltafold codecs`: what `--codec` and `--set` take."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import click

from deltafold.server.cli.output import Output, output_options, table


@click.command("codecs")
@output_options
@click.pass_obj
def codecs(output: Output) -> None:
    """List the codecs, their options with defaults, and how deltas are applied when served.

    A spec is a codec's name, or its name and options: bitdelta:bits=2,scale=row.

    \b
    deltafold codecs
    """
    from deltafold.compress import METHODS
    from deltafold.compress.terms import REGISTRY

    listed = [_describe(METHODS[name]) for name in sorted(METHODS)]
    terms = [{"id": term_id, "v": version} for term_id, version in sorted(REGISTRY)]
    output.result({"codecs": listed, "terms": terms}, _text(listed))


def _describe(method: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(method)
    return {
        "id": method.id,
        "summary": method.summary,
        "options": [_option(f, hints[f.name]) for f in dataclasses.fields(method)],
        "needs": list(method.needs),
        "applied": method.applied,
        "paper": method.paper,
    }


def _option(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    option: dict[str, Any] = {"name": field.name, "default": field.default}
    if typing.get_origin(hint) is typing.Literal:
        option["choices"] = list(typing.get_args(hint))
    else:
        option["type"] = getattr(hint, "__name__", str(hint))
    return option


def _text(listed: list[dict[str, Any]]) -> str:
    rows = []
    for codec in listed:
        options = ",".join(f"{o['name']}={o['default']}" for o in codec["options"]) or "-"
        rows.append([codec["id"], options, codec["applied"], codec["paper"], codec["summary"]])
    head = ["codec", "options", "when served", "source", "what it does"]
    choices = [
        f"  {codec['id']}: {o['name']} is {', '.join(o['choices'])}"
        for codec in listed
        for o in codec["options"]
        if "choices" in o
    ]
    return "\n".join([table(head, rows), *([""] if choices else []), *choices])
