"""Compressing fine-tunes of one model into deltas against their base.

Needs neither a GPU nor transformers nor a server; every function takes paths or objects.
"""

from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.errors import CODES, DeltafoldError
from deltafold.compress.manifest import Manifest, schema
from deltafold.compress.methods import METHODS, Method, parse_spec
from deltafold.compress.pipeline import PackReport, compress_checkpoint
from deltafold.compress.progress import Progress
from deltafold.compress.recipe import Recipe
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.restore import RestoreReport, restore_checkpoint
from deltafold.compress.verify import VerifyReport, verify_delta
from deltafold.compress.version import version

__all__ = [
    "CODES",
    "METHODS",
    "Checkpoint",
    "DeltaRepo",
    "DeltafoldError",
    "Manifest",
    "Method",
    "PackReport",
    "Progress",
    "Recipe",
    "RestoreReport",
    "VerifyReport",
    "compress_checkpoint",
    "parse_spec",
    "restore_checkpoint",
    "schema",
    "verify_delta",
    "version",
]
