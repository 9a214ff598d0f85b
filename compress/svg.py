"""Writing SVG: a document, a few shapes, and scales of axes. Readable on light and dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Final

#: Colours that stay apart for most eyes, on white and on black (after Okabe and Ito, 2008).
COLOURS: Final = (
    *("#4c8fd6", "#e69f00", "#2fa37c", "#cc6fa8", "#d55e00", "#8ab6e8", "#b8a500", "#8f7fd6"),
    *("#c4a484", "#1f7a8c", "#a3c644", "#e8788a", "#8d6e63"),
)
#: What is left over.
GREY: Final = "#8b949e"
_STYLE: Final = """<style>
.df{font:12px system-ui,sans-serif}
.df .paper{fill:#fff}.df text{fill:#1f2328}.df .quiet{fill:#59636e}.df .title{font-weight:600}
.df .axis{stroke:#d1d9e0;stroke-width:1}.df .curve{fill:none;stroke:#4c8fd6;stroke-width:2}
.df .under{fill:#4c8fd6;opacity:.18}
@media(prefers-color-scheme:dark){.df .paper{fill:#0d1117}.df text{fill:#e6edf3}
.df .quiet{fill:#9198a1}.df .axis{stroke:#3d444d}}
</style>"""


def document(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """An SVG document of some size in pixels, its title at the top left."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="df" width="{width:g}" '
        f'height="{height:g}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{html.escape(title)}">\n{_STYLE}\n'
        f'<rect class="paper" width="100%" height="100%" rx="6"/>\n'
        f"{text(12, 22, title, 'title')}\n{body}\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words; `anchor` says which end of them is at x: start, middle or end."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">'
        f"{html.escape(words)}</text>"
    )


def rect(x: float, y: float, width: float, height: float, fill: str, hint: str = "") -> str:
    """A filled rectangle; `hint` shows where the mouse rests."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" '
        f'fill="{fill}"><title>{html.escape(hint)}</title></rect>'
    )


def dot(x: float, y: float, fill: str, hint: str = "", radius: float = 4) -> str:
    """A filled circle."""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}">'
        f"<title>{html.escape(hint)}</title></circle>"
    )


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of an axis."""
    return f'<line class="axis" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def curve(points: Sequence[tuple[float, float]], floor: float | None = None) -> str:
    """A line through points; with `floor` the area down to that height is shaded."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = f'<polyline class="curve" points="{path}"/>'
    if floor is None or not points:
        return drawn
    ends = f"{points[-1][0]:.1f},{floor:.1f} {points[0][0]:.1f},{floor:.1f}"
    return f'<polygon class="under" points="{path} {ends}"/>{drawn}'


def ticks(least: float, most: float, count: int = 5) -> list[float]:
    """Round numbers that divide a range about so many times."""
    span = most - least
    if span <= 0 or not math.isfinite(span):
        return [least]
    rough = span / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(least / step - 1e-9)
    return [n * step for n in range(first, math.floor(most / step + 1e-9) + 1)]
