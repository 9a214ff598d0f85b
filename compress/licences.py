"""The licence that a folder of a model states, as the head of a model card names it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

_HEAD: Final = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_FIELDS: Final = ("license", "license_name", "license_link")
_FILES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md")
#: What the first lines of a licence's text say, and its name on the hub.
_KNOWN: Final = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "bsd 3-clause": "bsd-3-clause",
    "bsd 2-clause": "bsd-2-clause",
    "gnu affero general public license": "agpl-3.0",
    "gnu general public license": "gpl-3.0",
    "creative commons attribution 4.0": "cc-by-4.0",
}


def licence_of(folder: Path) -> dict[str, str]:
    """Fields of a card's head: by `README.md`, else by a licence file; empty where neither says.

    A licence file whose text is not known is `other`, with a link to it.
    """
    stated = _stated(folder / "README.md")
    if stated:
        return stated
    for name in _FILES:
        try:
            beginning = (folder / name).read_text("utf-8", errors="replace")[:400].lower()
        except OSError:
            continue
        words = " ".join(beginning.split())
        known = next((licence for text, licence in _KNOWN.items() if text in words), None)
        return {"license": known} if known else {"license": "other", "license_link": name}
    return {}


def _stated(card: Path) -> dict[str, str]:
    try:
        match = _HEAD.match(card.read_text("utf-8", errors="replace"))
        head: Any = yaml.safe_load(match[1]) if match else None
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(head, dict) or not isinstance(head.get("license"), str):
        return {}
    return {field: head[field] for field in _FIELDS if isinstance(head.get(field), str)}
