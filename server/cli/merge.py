"""`deltafold merge`: several deltas of one base in, one delta out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from deltafold.server.cli.command import command_line
from deltafold.server.cli.output import Output, output_options, quiet_option
from deltafold.server.cli.packed import pack_data, pack_text
from deltafold.server.cli.recipes import read_recipe, recipe_options

if TYPE_CHECKING:
    from deltafold.compress import PackReport


@click.command("merge")
@click.argument("deltas", nargs=-1, required=True, metavar="DELTA...")
@click.option("--base", required=True, help="The base that they were packed against.")
@click.option(
    "--method", required=True, metavar="SPEC", help="How they are merged, e.g. ties:keep=0.2."
)
@click.option("--weights", metavar="A,B,...", help="One number a delta; 1 if left out.")
@click.option("-o", "--out", required=True, help="The delta repo to write; for twin a zoo folder.")
@recipe_options
@click.option(
    "--companions",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Take configuration and tokenizer from the N-th delta; the first if left out.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing delta.")
@quiet_option
@output_options
@click.pass_obj
def merge(
    output: Output,
    deltas: tuple[str, ...],
    base: str,
    method: str,
    weights: str | None,
    out: str,
    codec: str | None,
    sets: tuple[str, ...],
    edits: tuple[str, ...],
    recipe: str | None,
    companions: int,
    overwrite: bool,
) -> None:
    """Merge deltas of one base into one.

    The deltas may have any codecs. They are decoded, merged and packed tensor by tensor; no full
    checkpoint is made. `deltafold codecs` lists the methods.

    \b
    deltafold merge zoo/sql zoo/law --base Llama-3.1-8B --method ties -o zoo/both
    deltafold merge zoo/sql zoo/law --base Llama-3.1-8B --method task:scale=1 \\
        --weights 0.7,0.3 --codec int:bits=4 -o zoo/both
    deltafold merge zoo/sql zoo/law --base Llama-3.1-8B --method twin -o twin-zoo
    """
    from deltafold.compress import merge_deltas, twin_deltas
    from deltafold.compress.merges import Twin, parse_merge

    chosen = parse_merge(method)
    options: dict[str, Any] = {
        "method": chosen,
        "weights": _weights(weights),
        "recipe": read_recipe(codec, sets, recipe, edits),
        "companions": companions - 1,
        "overwrite": overwrite,
        "command": command_line("merge"),
    }
    began = time.monotonic()
    with output.progress() as progress:
        if isinstance(chosen, Twin):
            reports = list(twin_deltas(base, deltas, out, progress=progress, **options).values())
        else:
            reports = [merge_deltas(base, deltas, out, progress=progress, **options)]
    seconds = time.monotonic() - began
    output.result(_data(reports, seconds), "\n".join(pack_text(r, seconds) for r in reports))


def _data(reports: Sequence[PackReport], seconds: float) -> dict[str, Any]:
    data = pack_data(reports[0], seconds)
    if len(reports) > 1:
        data["own"] = [pack_data(report, seconds) for report in reports[1:]]
    return data


def _weights(text: str | None) -> list[float] | None:
    from deltafold.compress import DeltafoldError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise DeltafoldError(
            "bad-argument",
            f"--weights {text!r} is not a list of numbers.",
            fix="--weights 0.7,0.3",
        ) from error
