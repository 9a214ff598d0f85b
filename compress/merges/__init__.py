"""Merges by name, one file each. Importing this package registers them all."""

from deltafold.compress.merges.base import MERGES, Merge, Merging, SurveyedMerge, parse_merge
from deltafold.compress.merges.dare_task import DareTask
from deltafold.compress.merges.dare_ties import DareTies
from deltafold.compress.merges.della_ties import DellaTies
from deltafold.compress.merges.drop_and_sum import DropAndSum
from deltafold.compress.merges.task import Task
from deltafold.compress.merges.ties import Ties
from deltafold.compress.merges.twin import Twin

__all__ = [
    "MERGES",
    "DareTask",
    "DareTies",
    "DellaTies",
    "DropAndSum",
    "Merge",
    "Merging",
    "SurveyedMerge",
    "Task",
    "Ties",
    "Twin",
    "parse_merge",
]
