"""Merges by name, one file each. Importing this package registers them all."""

from deltafold.compress.merges.base import MERGES, Merge, SurveyedMerge, parse_merge
from deltafold.compress.merges.task import Task

__all__ = ["MERGES", "Merge", "SurveyedMerge", "Task", "parse_merge"]
