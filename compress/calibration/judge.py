"""Measuring models, given by their tensors, beside the fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltafold.compress.calibration.data import CalibrationSet, read_calibration
from deltafold.compress.calibration.evidence import CalibratedEvidence
from deltafold.compress.calibration.model import load_delta, load_source, load_tensors
from deltafold.compress.calibration.quality import Quality, compare
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.fingerprint import digest_source, fingerprint
from deltafold.compress.quality import figures
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.source import open_variant


@dataclass(frozen=True)
class CalibratedJudge:
    """The judge that goes with a calibration run: its data, and its loaded fine-tune.

    Two models are in memory while one is measured. Logits are compared batch by batch and not kept:
    those of a large vocabulary are larger than the model.
    """

    evidence: CalibratedEvidence
    device: str = "cpu"

    def measure(self, tensors: Mapping[str, torch.Tensor]) -> Quality:
        """A model beside the fine-tune."""
        folder = self.evidence.source.reference.folder
        other = load_tensors(folder, tensors, device=self.device)
        return compare(self.evidence.model, other, self.data)

    def record(self) -> dict[str, Any]:
        """What a manifest says about the data."""
        return self.data.record()

    @property
    def data(self) -> CalibrationSet:
        """The calibration set."""
        return self.evidence.data


def evaluate_delta(
    base: str | Path,
    delta: str | Path,
    against: str | Path,
    file: str | Path,
    *,
    rows: int = 64,
    length: int = 512,
    device: str = "cpu",
) -> dict[str, Any]:
    """Figures of a delta's model beside its fine-tune, for `record_quality`.

    Args:
        base: folder or hub id of the base.
        delta: the delta repo.
        against: folder or hub id of the fine-tune: a checkpoint, or a lossless delta.
        file: examples, see `read_calibration`.
        rows: most rows taken.
        length: most tokens of a row.
        device: where the models run.

    Raises:
        DeltafoldError: `base-mismatch`; `bad-argument` where `against` is not the fine-tune that the
            delta was made of; whatever is wrong with the file.
    """
    source, repo = Checkpoint.open(base), DeltaRepo.open(delta)
    repo.check_base(digest_source(source), given=source.reference.name)
    target = open_variant(against, source)
    _check_variant(repo, target)
    data = read_calibration(file, target.reference.folder, rows=rows, length=length)
    reference = load_source(target, device=device)
    found = compare(reference, load_delta(source, repo, device=device), data)
    return figures(found, data.record())


def _check_variant(repo: DeltaRepo, target: TensorSource) -> None:
    found = fingerprint(digest_source(target))
    expected = repo.manifest.variant.fingerprint
    if found != expected:
        raise DeltafoldError(
            "bad-argument",
            f"{target.reference.name} is not the fine-tune that {repo.folder} was made of.",
            facts=[
                ("made of", f"{repo.manifest.variant.name}  ({expected[:23]}...)"),
                ("you gave", f"{target.reference.name}  ({found[:23]}...)"),
            ],
            fix="--against the fine-tune that was packed",
        )
