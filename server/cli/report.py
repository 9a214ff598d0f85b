"""`deltafold report`: a page with pictures."""

from __future__ import annotations

import click

from deltafold.server.cli.output import Output, output_options


@click.command("report")
@click.argument("delta_or_zoo", metavar="DELTA|ZOO")
@click.option("-o", "--out", default="report.html", show_default=True, help="The page to write.")
@click.option("--svg-dir", help="Also write the pictures as SVG files, into this folder.")
@output_options
@click.pass_obj
def report(output: Output, delta_or_zoo: str, out: str, svg_dir: str | None) -> None:
    """Draw a delta, or a zoo of deltas, on one HTML page that needs nothing else.

    Shown are where the bytes go, what the codec misses by layer and projection, size against
    quality where it was measured, and memory while packing where it was recorded.

    \b
    deltafold report zoo/sql -o sql.html
    deltafold report zoo -o zoo.html --svg-dir pictures
    """
    from deltafold.compress.report import write_report

    page, pictures = write_report(delta_or_zoo, out, svg_dir=svg_dir)
    data = {"out": str(page), "pictures": [str(path) for path in pictures]}
    drawn = f", and {len(pictures)} pictures in {svg_dir}" if pictures else ""
    output.result(data, f"{page}: written{drawn}")
