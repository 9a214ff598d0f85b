"""From what users give (a file, folders) to evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from deltafold.compress.calibration.data import read_calibration
from deltafold.compress.calibration.evidence import (
    AT_THE_FINE_TUNE,
    CalibratedEvidence,
    SafeExamples,
)
from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.evidence import Need
from deltafold.compress.model_memory import GROUP_BYTES
from deltafold.compress.naming import NamedBase
from deltafold.compress.references import Reference, open_references
from deltafold.compress.source import open_variant


def calibrate(
    base: str | Path,
    variant: str | Path,
    file: str | Path,
    *,
    rows: int = 64,
    length: int = 512,
    references: Mapping[str, str | Path] | None = None,
    safe: str | Path | None = None,
    wanted: Iterable[Need] = AT_THE_FINE_TUNE,
    device: str = "cpu",
    group_bytes: int = GROUP_BYTES,
) -> CalibratedEvidence:
    """Evidence for packing a fine-tune; the model is loaded when the first of it is asked for.

    Args:
        base: folder or hub id of the base checkpoint.
        variant: folder or hub id of the fine-tune: a checkpoint, or a lossless delta repo.
        file: the calibration file, see `read_calibration`.
        rows: most rows taken.
        length: most tokens of a row.
        references: other checkpoints by role, see `open_references`.
        safe: a file of harmful prompts with safe answers, which the aligned model is run on: the
            reference `aligned`, or the base.
        wanted: the needs to meet, `Recipe.needs()`.
        device: where the model runs.
        group_bytes: most memory for the moments, or the gradients, of one pass.

    Raises:
        DeltafoldError: as `read_calibration` and `open_variant`; whatever is wrong with references.
    """
    checkpoint = Checkpoint.open(base)
    source = open_variant(variant, checkpoint)
    others = open_references(references or {}, checkpoint, source)
    data = read_calibration(file, source.reference.folder, rows=rows, length=length)
    examples = None
    if safe is not None:
        aligned = others.get("aligned") or Reference.of(NamedBase.of(checkpoint, source))
        folder = aligned.source.reference.folder
        examples = SafeExamples(read_calibration(safe, folder, rows=rows, length=length), aligned)
    return CalibratedEvidence(
        source,
        data,
        wanted=wanted,
        references=others,
        safe=examples,
        device=device,
        group_bytes=group_bytes,
    )
