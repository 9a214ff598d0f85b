"""Compressing fine-tunes of one model into deltas against their base.

Needs neither a GPU nor transformers nor a server; every function takes paths or objects. Names are
imported on first use: a command that only prints an error need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltafold.compress.budget.goal import Budget as Budget
    from deltafold.compress.budget.plan import Plan as Plan
    from deltafold.compress.checkpoint import Checkpoint as Checkpoint
    from deltafold.compress.errors import CODES as CODES
    from deltafold.compress.errors import DeltafoldError as DeltafoldError
    from deltafold.compress.export import ExportReport as ExportReport
    from deltafold.compress.export import export_peft as export_peft
    from deltafold.compress.lora import import_lora as import_lora
    from deltafold.compress.manifest import Manifest as Manifest
    from deltafold.compress.manifest import schema as schema
    from deltafold.compress.merging import merge_deltas as merge_deltas
    from deltafold.compress.merging import twin_deltas as twin_deltas
    from deltafold.compress.methods import METHODS as METHODS
    from deltafold.compress.methods import Method as Method
    from deltafold.compress.methods import parse_spec as parse_spec
    from deltafold.compress.pipeline import PackReport as PackReport
    from deltafold.compress.pipeline import compress_checkpoint as compress_checkpoint
    from deltafold.compress.pipeline import plan_checkpoint as plan_checkpoint
    from deltafold.compress.pipeline import predict_checkpoint as predict_checkpoint
    from deltafold.compress.progress import Progress as Progress
    from deltafold.compress.recipe import Recipe as Recipe
    from deltafold.compress.release import version as version
    from deltafold.compress.repo import DeltaRepo as DeltaRepo
    from deltafold.compress.restore import RestoreReport as RestoreReport
    from deltafold.compress.restore import restore_checkpoint as restore_checkpoint
    from deltafold.compress.verify import VerifyReport as VerifyReport
    from deltafold.compress.verify import verify_delta as verify_delta

_HOMES = {
    "CODES": "errors",
    "Budget": "budget.goal",
    "METHODS": "methods",
    "Checkpoint": "checkpoint",
    "DeltaRepo": "repo",
    "DeltafoldError": "errors",
    "ExportReport": "export",
    "Manifest": "manifest",
    "Method": "methods",
    "PackReport": "pipeline",
    "Plan": "budget.plan",
    "Progress": "progress",
    "Recipe": "recipe",
    "RestoreReport": "restore",
    "VerifyReport": "verify",
    "compress_checkpoint": "pipeline",
    "export_peft": "export",
    "import_lora": "lora",
    "merge_deltas": "merging",
    "parse_spec": "methods",
    "plan_checkpoint": "pipeline",
    "predict_checkpoint": "pipeline",
    "restore_checkpoint": "restore",
    "schema": "manifest",
    "twin_deltas": "merging",
    "verify_delta": "verify",
    "version": "release",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"deltafold.compress.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'deltafold.compress' has no attribute {name!r}")
