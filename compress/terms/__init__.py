"""Representations of a delta, one file each. Importing this package registers them all."""

from deltafold.compress.terms.banded import Banded
from deltafold.compress.terms.base import (
    REGISTRY,
    Context,
    Encoded,
    ExactTerm,
    MeasuredTerm,
    Parts,
    PartSpec,
    SharedSource,
    Term,
    config_of,
    is_exact,
    rows_and_columns,
    term_from_config,
)
from deltafold.compress.terms.blocks import Blocks
from deltafold.compress.terms.codebook import Codebook
from deltafold.compress.terms.codes import Codes
from deltafold.compress.terms.column_planes import ColumnPlanes
from deltafold.compress.terms.columns import Columns
from deltafold.compress.terms.dense import Dense
from deltafold.compress.terms.exact import Exact
from deltafold.compress.terms.lossless import Lossless
from deltafold.compress.terms.lossless_v1 import LosslessStreams
from deltafold.compress.terms.lowrank import LowRank
from deltafold.compress.terms.nm import NM
from deltafold.compress.terms.patches import Patches
from deltafold.compress.terms.planes import Planes
from deltafold.compress.terms.rows import Rows
from deltafold.compress.terms.scaling import scaled
from deltafold.compress.terms.shared import Shared
from deltafold.compress.terms.sparse import Sparse
from deltafold.compress.terms.sparse_codes import SparseCodes

__all__ = [
    "NM",
    "REGISTRY",
    "Banded",
    "Blocks",
    "Codebook",
    "Codes",
    "ColumnPlanes",
    "Columns",
    "Context",
    "Dense",
    "Encoded",
    "Exact",
    "ExactTerm",
    "Lossless",
    "LosslessStreams",
    "LowRank",
    "MeasuredTerm",
    "PartSpec",
    "Parts",
    "Patches",
    "Planes",
    "Rows",
    "Shared",
    "SharedSource",
    "Sparse",
    "SparseCodes",
    "Term",
    "config_of",
    "is_exact",
    "rows_and_columns",
    "scaled",
    "term_from_config",
]
