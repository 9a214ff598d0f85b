"""Heat maps of numbers by layer and projection, as SVG text."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_CELL_W: Final = 66
_CELL_H: Final = 20
_LABEL: Final = 9  # pixels a letter, more or less
_FONT: Final = 'font-family="system-ui, sans-serif" font-size="11"'
#: A number between dots: the layer. What comes before it is the stack that the layer is in.
_LAYER: Final = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_RED: Final = (178, 24, 43)
_BLUE: Final = (33, 102, 172)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the map; tensors outside layers have a row of their own."""

    row: str
    column: str


def place_of(name: str) -> Place:
    """`model.layers.3.mlp.up_proj.weight` is row `layers.3`, column `mlp.up_proj`."""
    match = _LAYER.match(name)
    if match is None:
        return Place(name.removesuffix(".weight"), "whole")
    stack = match[1].rpartition(".")[2]
    return Place(f"{stack}.{match[2]}", match[3].removesuffix(".weight"))


def heat_map(
    values: Mapping[str, float], *, title: str, unit: str = "", deepest: float | None = None
) -> str:
    """An SVG of numbers by tensor name; red above zero, blue below, by the square root of the size.

    Args:
        values: finite numbers by tensor name.
        title: above the map.
        unit: behind the numbers, where the mouse rests.
        deepest: the size that has the deepest colour; the largest that occurs if None.
    """
    places = {name: place_of(name) for name in values}
    rows = sorted({p.row for p in places.values()}, key=_natural)
    columns = sorted({p.column for p in places.values()}, key=lambda c: (c == "whole", c))
    left = 12 + _LABEL * max((len(row) for row in rows), default=1)
    # Column labels lean to the right: as much room above as to the side of the last one.
    longest = max((len(column) for column in columns), default=1)
    top = 26 + 5 * longest
    most = max((abs(v) for v in values.values()), default=0.0)
    most = most if deepest is None else max(most, deepest)
    width = left + _CELL_W * len(columns) + 6 * longest
    height = top + _CELL_H * len(rows) + 34
    parts = [_text(8, 16, title, 'font-weight="bold"')]
    for i, column in enumerate(columns):
        x = left + _CELL_W * i + _CELL_W / 2
        parts.append(_text(x, top - 6, column, f'transform="rotate(-35 {x:g} {top - 6})"'))
    for i, row in enumerate(rows):
        parts.append(_text(left - 6, top + _CELL_H * i + 14, row, 'text-anchor="end"'))
    for name, value in values.items():
        x = left + _CELL_W * columns.index(places[name].column)
        y = top + _CELL_H * rows.index(places[name].row)
        parts.append(_cell(x, y, value, most, f"{name}: {value:.3g}{unit}"))
    legend = f"deepest red {most:.3g}{unit}"
    if any(value < 0 for value in values.values()):
        legend += f", deepest blue {-most:.3g}{unit}"
    parts.append(_text(8, height - 10, legend))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" {_FONT}>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _cell(x: float, y: float, value: float, most: float, hint: str) -> str:
    share = math.sqrt(abs(value) / most) if most > 0 else 0.0
    end = _RED if value > 0 else _BLUE
    red, green, blue = (round(247 + (channel - 247) * share) for channel in end)
    ink = "white" if share > 0.7 else "black"
    return (
        f"<g><title>{html.escape(hint)}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{_CELL_W - 1}" height="{_CELL_H - 1}" '
        f'fill="rgb({red},{green},{blue})"/>'
        f'<text x="{x + _CELL_W / 2:g}" y="{y + 14:g}" text-anchor="middle" fill="{ink}">'
        f"{value:.2g}</text></g>"
    )


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {more}>{html.escape(text)}</text>'


def _natural(row: str) -> tuple[bool, str, int]:
    """Layers in the order of their numbers, then everything that is in no layer."""
    stack, _, number = row.rpartition(".")
    return (not number.isdigit(), stack, int(number) if number.isdigit() else 0)
