"""Packing and restoring in tests, with little to type."""

from __future__ import annotations

from pathlib import Path

from checkpoints import Pair, Tensors, read_checkpoint

from deltafold.compress import (
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
)

LOSSLESS = Recipe(default=parse_spec("lossless"))
MATRIX = "model.layers.0.self_attn.q_proj.weight"
TABLE = "model.embed_tokens.weight"


def pack(pair: Pair, recipe: Recipe | None = None, **options) -> DeltaRepo:
    compress_checkpoint(pair.base, pair.variant, pair.out, recipe=recipe, **options)
    return DeltaRepo.open(pair.out)


def restored(pair: Pair, **options) -> Tensors:
    out = pair.root / "restored"
    restore_checkpoint(pair.out, pair.base, out, overwrite=True, **options)
    return read_checkpoint(out)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, but for what tells how much memory a run took when."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "memory.csv"
    }
