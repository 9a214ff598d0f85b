"""Edits by name, one file each. Importing this package registers them all."""

from deltafold.compress.edits.base import EDITS, Edit, SurveyedEdit, parse_edit
from deltafold.compress.edits.scale import Scale

__all__ = ["EDITS", "Edit", "Scale", "SurveyedEdit", "parse_edit"]
