"""Writing down how well a delta's model answers, in the delta itself.

Quality is evidence, not content: the delta's identity stays what it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deltafold.compress.budget.probe import Measured
from deltafold.compress.card import card_text
from deltafold.compress.durable import write_atomically
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.manifest import MANIFEST_NAME, Manifest, parse_manifest

QUALITY_NAME: Final = "report/quality.json"
_CARD: Final = "README.md"


def figures(found: Measured, data: Mapping[str, Any]) -> dict[str, Any]:
    """Figures under the names that manifests use, with what they were measured on."""
    names = {"kl": "kl_mean", "agreement": "top1_agreement"}
    return {**{names.get(k, k): v for k, v in found.to_json().items()}, "data": dict(data)}


def record_quality(folder: Path, quality: Mapping[str, Any]) -> Manifest:
    """Put figures into a delta's manifest, card and `report/quality.json`.

    Figures of the same name are replaced, others stay. Each file is replaced whole, the manifest last:
    a reader finds the old delta or the new one, and what is cut off can be done again.

    Args:
        folder: the delta repo.
        quality: plain data.

    Returns:
        The new manifest; its `delta_id` is the old one's.

    Raises:
        DeltafoldError: as `parse_manifest`; `bad-argument` where the folder cannot be written.
    """
    path = folder / MANIFEST_NAME
    old = parse_manifest(path.read_text("utf-8"), str(path))
    merged = {**old.quality, **quality}
    new = old.model_copy(update={"quality": merged})
    assert new.content_digest() == old.delta_id
    try:
        (folder / "report").mkdir(exist_ok=True)
        write_atomically(folder / QUALITY_NAME, json.dumps(merged, indent=2) + "\n")
        write_atomically(folder / _CARD, card_text(new, folder))
        text = json.dumps(new.model_dump(mode="json"), indent=2) + "\n"
        write_atomically(folder / MANIFEST_NAME, text)
    except OSError as error:
        raise DeltafoldError(
            "bad-argument",
            f"{folder} cannot be written: {error.strerror}.",
            fix="copy the delta to a place of your own first",
        ) from error
    return new
