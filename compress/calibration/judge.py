"""Measuring models, given by their tensors, beside the fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deltafold.compress.calibration.data import CalibrationSet
from deltafold.compress.calibration.evidence import CalibratedEvidence
from deltafold.compress.calibration.model import load_tensors
from deltafold.compress.calibration.quality import Quality, compare


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
