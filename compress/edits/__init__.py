"""Edits by name, one file each. Importing this package registers them all."""

from deltafold.compress.edits.base import EDITS, Edit, SurveyedEdit, parse_edit
from deltafold.compress.edits.dare import DareEdit
from deltafold.compress.edits.dare_k import DareK
from deltafold.compress.edits.dare_k_gradient import DareKGradient
from deltafold.compress.edits.darex_q import DarexQ
from deltafold.compress.edits.della import Della
from deltafold.compress.edits.irr import Irr
from deltafold.compress.edits.safe_delta import SafeDelta
from deltafold.compress.edits.sampled_magnitudes import SampledMagnitudes
from deltafold.compress.edits.scale import Scale
from deltafold.compress.edits.stratified import Stratified
from deltafold.compress.edits.trim import Trim

__all__ = [
    "EDITS",
    "DareEdit",
    "DareK",
    "DareKGradient",
    "DarexQ",
    "Della",
    "Edit",
    "Irr",
    "SafeDelta",
    "SampledMagnitudes",
    "Scale",
    "Stratified",
    "SurveyedEdit",
    "Trim",
    "parse_edit",
]
