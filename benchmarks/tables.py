"""Tables that benchmarks put into pages."""

from __future__ import annotations

import sys
from pathlib import Path


def put_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a page."""
    head, _, rest = page.read_text("utf-8").partition(marks[0])
    _, end, tail = rest.partition(marks[1])
    if not end:
        sys.exit(f"{page} has no {marks[0]} and {marks[1]}")
    page.write_text(f"{head}{marks[0]}\n\n{text}\n\n{marks[1]}{tail}", "utf-8")
