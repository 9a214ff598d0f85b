"""From what users give (a file, folders) to evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from deltafold.compress.calibration.data import read_calibration
from deltafold.compress.calibration.evidence import AT_THE_FINE_TUNE, CalibratedEvidence
from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need, Role
from deltafold.compress.naming import NamedBase
from deltafold.compress.source import open_variant


def calibrate(
    base: str | Path,
    variant: str | Path,
    file: str | Path,
    *,
    rows: int = 64,
    length: int = 512,
    references: Mapping[str, str | Path] | None = None,
    wanted: Iterable[Need] = AT_THE_FINE_TUNE,
    device: str = "cpu",
) -> CalibratedEvidence:
    """Evidence for packing a fine-tune; the model is loaded when the first of it is asked for.

    Args:
        base: folder or hub id of the base checkpoint.
        variant: folder or hub id of the fine-tune: a checkpoint, or a lossless delta repo.
        file: the calibration file, see `read_calibration`.
        rows: most rows taken.
        length: most tokens of a row.
        references: folders or hub ids of other checkpoints, by role: `aligned`, `unaligned`.
        wanted: the needs to meet, `Recipe.needs()`.
        device: where the model runs.

    Raises:
        DeltafoldError: as `read_calibration` and `open_variant`; `bad-argument` for an unknown role.
    """
    for role in references or {}:
        if role not in get_args(Role):
            raise DeltafoldError(
                "bad-argument",
                f"{role!r} is no role of a reference checkpoint.",
                facts=[("roles", ", ".join(get_args(Role)))],
                fix="--reference aligned=FOLDER",
            )
    source = open_variant(variant, Checkpoint.open(base))
    data = read_calibration(file, source.reference.folder, rows=rows, length=length)
    others = {
        role: NamedBase.of(Checkpoint.open(folder), source)
        for role, folder in (references or {}).items()
    }
    return CalibratedEvidence(source, data, wanted=wanted, references=others, device=device)
