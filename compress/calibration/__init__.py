"""Running a model on calibration data: what methods may learn of a fine-tune beyond its weights.

The one part of `compress` that needs transformers, imported when a model is first loaded.
"""

from deltafold.compress.calibration.data import CalibrationSet, read_calibration
from deltafold.compress.calibration.evidence import CalibratedEvidence
from deltafold.compress.calibration.fit import compress_and_fit, fit_scales
from deltafold.compress.calibration.judge import CalibratedJudge
from deltafold.compress.calibration.model import (
    ParameterMap,
    decoded_tensors,
    load_delta,
    load_model,
    load_source,
    load_tensors,
)
from deltafold.compress.calibration.opening import calibrate
from deltafold.compress.calibration.quality import (
    Quality,
    compare,
    compare_logits,
    logits_of,
    mean_loss,
)
from deltafold.compress.fitting import LogitFit

__all__ = [
    "CalibratedEvidence",
    "CalibratedJudge",
    "CalibrationSet",
    "LogitFit",
    "ParameterMap",
    "Quality",
    "calibrate",
    "compare",
    "compare_logits",
    "compress_and_fit",
    "decoded_tensors",
    "fit_scales",
    "load_delta",
    "load_model",
    "load_source",
    "load_tensors",
    "logits_of",
    "mean_loss",
    "read_calibration",
]
