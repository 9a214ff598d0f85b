"""Family methods by name, one file each. Importing this package registers them all."""

from deltafold.compress.families.base import FAMILIES, FamilyMethod, parse_family
from deltafold.compress.families.emr import Emr
from deltafold.compress.families.row_groups import RowGroups
from deltafold.compress.families.shift_scale import ShiftScaleFamily

__all__ = ["FAMILIES", "Emr", "FamilyMethod", "RowGroups", "ShiftScaleFamily", "parse_family"]
