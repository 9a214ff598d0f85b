"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re
from typing import Final

from deltafold.compress.errors import DeltafoldError

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([KMGT])?(I?)B?)?")


def parse_size(text: str, fix: str) -> int:
    """`4GiB`, `500 MB`, `1.5G` or a number of bytes: KB is 1000, KiB and K are 1024 bytes.

    Raises:
        DeltafoldError: `bad-argument`, with the given fix.
    """
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None or (found[3] and not found[2]):
        raise DeltafoldError("bad-argument", f"{text!r} is not a size.", fix=fix)
    decimal = found[2] and not found[3] and found[0].endswith("B")
    power = " KMGT".index(found[2] or " ")
    return int(float(found[1]) * (1000 if decimal else 1024) ** power)


def human(nbytes: float) -> str:
    """Bytes as people read them: `1.15 GiB`."""
    if nbytes < 1024:
        return f"{nbytes:.0f} bytes"
    value, units = float(nbytes), iter(("KiB", "MiB", "GiB", "TiB"))
    unit = "bytes"
    while value >= 1024 and (unit_ := next(units, None)) is not None:
        value, unit = value / 1024, unit_
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
