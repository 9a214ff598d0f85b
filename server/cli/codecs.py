"""`deltafold codecs`: what `--codec`, `--set`, `--edit` and `--method` take."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import click

from deltafold.server.cli.output import Output, output_options, table

#: The tensor for which sizes are listed.
_MATRIX = (4096, 4096)
#: Fine-tunes of the family for which sizes are listed.
_MEMBERS = 8


@click.command("codecs")
@output_options
@click.pass_obj
def codecs(output: Output) -> None:
    """List codecs, edits, family methods and merges with their options, needs and sources.

    A spec is a codec's name, or its name and options: bitdelta:bits=2,scale=row. The class is what
    arXiv 2410.13841 says of the loss; `deltafold diagnose` measures it for a fine-tune of yours.

    \b
    deltafold codecs
    """
    from deltafold.compress import METHODS
    from deltafold.compress.edits import EDITS
    from deltafold.compress.families import FAMILIES
    from deltafold.compress.merges import MERGES
    from deltafold.compress.terms import REGISTRY

    listed = [
        _describe("codec", METHODS[name]) | {"bits": _bits(METHODS[name])}
        for name in sorted(METHODS)
    ]
    edits = [_describe("edit", EDITS[name]) for name in sorted(EDITS)]
    families = [
        _describe("family", FAMILIES[name]) | {"bits": _member_bits(FAMILIES[name])}
        for name in sorted(FAMILIES)
    ]
    merges = [_describe("merge", MERGES[name]) for name in sorted(MERGES)]
    terms = [{"id": term_id, "v": version} for term_id, version in sorted(REGISTRY)]
    data = {
        "codecs": listed,
        "edits": edits,
        "families": families,
        "merges": merges,
        "terms": terms,
    }
    parts = [
        _text("codec", listed),
        _text("edit", edits),
        _text("family", families),
        _text("merge", merges),
    ]
    output.result(data, "\n\n".join(parts))


def _describe(kind: str, method: type[Any]) -> dict[str, Any]:
    from deltafold.compress.classes import CLASSES
    from deltafold.compress.spec import options_of

    hints = typing.get_type_hints(method)
    described = {
        "id": method.id,
        "kind": kind,
        "class": CLASSES[kind].get(method.id),
        "summary": method.summary,
        "options": [_option(f, hints[f.name]) for f in options_of(method)],
        "needs": list(method().needs),
        "paper": method.paper,
    }
    if hasattr(method, "applied"):
        described["applied"] = method.applied
    if kind == "codec":
        described["on_device"] = bool(getattr(method, "on_device", False))
    return described


def _bits(method: type[Any]) -> float:
    """Bits a weight of a common matrix, with the options as they are listed."""
    from deltafold.compress.methods import bits_per_weight

    return round(bits_per_weight(method(), _MATRIX, "BF16"), 3)


def _member_bits(method: type[Any]) -> float:
    """Bits a weight of one of eight members, an eighth of what they share in 16-bit numbers counted."""
    from deltafold.compress.methods import bits_per_weight

    chosen, members = method(), _MEMBERS
    term = chosen.term(members)
    rows, columns = _MATRIX
    own = 8 * sum(int(spec.nbytes) for spec in term.parts(_MATRIX).values()) / (rows * columns)
    rest = getattr(chosen, "codec", None)
    own += bits_per_weight(rest, _MATRIX, "BF16") if rest is not None else 0.0
    return round(float(own + 16 * term.groups / members), 3)


def _option(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    option: dict[str, Any] = {"name": field.name, "default": field.default}
    if typing.get_origin(hint) is typing.Literal:
        option["choices"] = list(typing.get_args(hint))
    else:
        option["type"] = getattr(hint, "__name__", str(hint))
    return option


def _text(word: str, listed: list[dict[str, Any]]) -> str:
    from deltafold.compress.spec import written

    rows = []
    for item in listed:
        options = ",".join(f"{o['name']}={written(o['default'])}" for o in item["options"])
        needs = ", ".join(item["needs"]) or "nothing"
        served = [f"{item['bits']:.2f}"] if "bits" in item else []
        served += [item["applied"]] if "applied" in item else []
        known = item["class"] or "-"
        rows.append(
            [item["id"], options or "-", needs, *served, known, item["paper"], item["summary"]]
        )
    first = listed[0] if listed else {}
    served = [name for key, name in (("bits", "bits"), ("applied", "when served")) if key in first]
    head = [word, "options", "needs", *served, "class", "source", "what it does"]
    choices = [
        f"  {item['id']}: {o['name']} is {', '.join(o['choices'])}"
        for item in listed
        for o in item["options"]
        if "choices" in o
    ]
    there = ", ".join(item["id"] for item in listed if item.get("on_device"))
    notes = [f"  --device cuda runs: {there}"] if there else []
    return "\n".join([table(head, rows), *([""] if choices or notes else []), *choices, *notes])
