"""`deltafold family`: a base and several fine-tunes in, a zoo of deltas that share tensors out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from deltafold.compress.sizes import human
from deltafold.server.cli.command import command_line
from deltafold.server.cli.output import Output, facts, output_options, quiet_option, table
from deltafold.server.cli.recipes import read_recipe

if TYPE_CHECKING:
    from deltafold.compress.families.pack import FamilyReport


@click.command("family")
@click.argument("base")
@click.argument("variants", metavar="VARIANT...", nargs=-1, required=True)
@click.option("-o", "--out", required=True, help="The zoo to write the deltas to.")
@click.option(
    "--method", metavar="SPEC", required=True, help="What is shared: emr, or row-groups:groups=N."
)
@click.option(
    "--codec", metavar="SPEC", help="Codec of the shared tensors; float16 numbers if left out."
)
@click.option(
    "--names", help="Names of the deltas, separated by commas; the variants' if left out."
)
@click.option(
    "--set",
    "sets",
    metavar="'PATTERN=SPEC'",
    multiple=True,
    help="Do not share the tensors whose names match, and give them this codec; repeat it.",
)
@click.option(
    "--accept",
    metavar="WORD",
    multiple=True,
    help="Let a difference in structure through, as in `compress`; repeat it for several.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing deltas of these names.")
@quiet_option
@output_options
@click.pass_obj
def family(
    output: Output,
    base: str,
    variants: tuple[str, ...],
    out: str,
    method: str,
    codec: str | None,
    names: str | None,
    sets: tuple[str, ...],
    accept: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Pack fine-tunes of BASE together, so that their deltas share tensors.

    Each delta keeps a mask or an index; what they share lies once in the zoo, under .families, and must
    go along wherever one of them goes.

    \b
    deltafold family Llama-3.1-8B ./sql-ft ./law-ft ./chat-ft -o zoo --method emr
    """
    from deltafold.compress import parse_spec
    from deltafold.compress.families import parse_family
    from deltafold.compress.families.pack import compress_family

    chosen, shared = parse_family(method), parse_spec(codec) if codec else None
    began = time.monotonic()
    with output.progress() as progress:
        report = compress_family(
            base,
            variants,
            out,
            method=chosen,
            codec=shared,
            names=[n.strip() for n in names.split(",")] if names else (),
            recipe=read_recipe(None, sets, None),
            accept=accept,
            overwrite=overwrite,
            command=command_line("family"),
            progress=progress,
        )
    data = _data(report, time.monotonic() - began)
    output.result(data, _text(data))


def _data(report: FamilyReport, seconds: float) -> dict[str, Any]:
    from deltafold.compress.memory import peak_memory

    deltas = [
        {
            "name": name,
            "delta_id": pack.manifest.delta_id,
            "bytes": pack.manifest.totals.delta_bytes,
            "variant_bytes": pack.manifest.totals.variant_bytes,
            "ratio": pack.ratio,
            "coverage": pack.coverage,
            "worst": [{"tensor": n, "rel_error": e} for n, e in pack.worst()],
        }
        for name, pack in report.packs.items()
    ]
    return {
        "out": str(report.out),
        "family_id": report.family.family_id,
        "method": report.family.method,
        "codec": report.family.codec,
        "family_bytes": report.family.bytes,
        "delta_bytes": report.delta_bytes,
        "bytes": report.family.bytes + report.delta_bytes,
        "ratio": report.ratio,
        "deltas": deltas,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
    }


def _text(data: dict[str, Any]) -> str:
    deltas = data["deltas"]
    whole = sum(d["variant_bytes"] for d in deltas)
    lines = [
        ("shared", f"{human(data['family_bytes'])}, {data['method']}, stored as {data['codec']}"),
        ("deltas", f"{human(data['delta_bytes'])} in {len(deltas)}"),
        ("together", f"{human(data['bytes'])}, {data['ratio']:.2%} of {human(whole)}"),
        ("family", data["family_id"]),
        ("took", f"{data['seconds']:.1f} s, peak memory {human(data['peak_memory_bytes'])}"),
    ]
    rows = [
        [d["name"], human(d["bytes"]), f"{d['ratio']:.2%}", f"{d['worst'][0]['rel_error']:.3f}"]
        if d["worst"]
        else [d["name"], human(d["bytes"]), f"{d['ratio']:.2%}", "-"]
        for d in deltas
    ]
    head = ["name", "own size", "ratio", "largest error"]
    own = table(head, rows, "own size ratio largest error")
    return f"{data['out']}: written and verified\n{facts(lines)}\n\n{own}"
