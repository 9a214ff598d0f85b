"""Tensors rebuilt piece by piece are what they are as a whole, and take a piece's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import bits, write_checkpoint

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
)
from deltafold.compress.rebuild import restored_pieces, restored_tensor

ROWS, COLUMNS = 50, 24
SPECS = ["bitdelta:bits=2", "int:bits=4", "dare:drop=0.5", "svd:rank=2", "exact", "lossless"]
CHANGES = ["all", "few", "scattered", "none", "more", "less", "stack", "dtype"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Nine rows a block."""
    monkeypatch.setattr("deltafold.compress.terms.blocks.BLOCK", 9 * COLUMNS)


def packed(folder: Path, change: str, spec: str) -> tuple[DeltaRepo, Checkpoint]:
    draw = torch.Generator().manual_seed(3)
    base = torch.randn(ROWS, COLUMNS, generator=draw).mul(0.1).bfloat16()
    base[:, 3] = -0.0
    step = torch.randn(ROWS, COLUMNS, generator=draw) * 0.01
    rows = torch.arange(ROWS)
    kept = {"few": rows % 3 > 0, "scattered": (rows < 30) | (rows % 7 > 0), "none": rows >= 0}
    if change in kept:
        step[kept[change]] = 0
    variant = (base.float() + step).bfloat16()
    variant[step == 0] = base[step == 0]
    if change == "more":
        variant = torch.cat([variant, torch.full((13, COLUMNS), 0.5).bfloat16()])
    if change == "less":
        variant = variant[:-5].clone()
    if change == "stack":
        base, variant = (torch.cat([t, t[:, :16]], 1).reshape(5, 10, 40) for t in (base, variant))
    if change == "dtype":
        variant = variant.half()
    base_folder = write_checkpoint(folder / "base", {"w": base.contiguous()})
    tuned = write_checkpoint(folder / "variant", {"w": variant.contiguous()})
    recipe = Recipe(default=parse_spec(spec))
    compress_checkpoint(base_folder, tuned, folder / "out", recipe=recipe, accept=["resized"])
    return DeltaRepo.open(folder / "out"), Checkpoint.open(base_folder)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("spec", SPECS)
def test_pieces_are_the_tensor(tmp_path, spec, change):
    repo, source = packed(tmp_path, change, spec)
    base = repo.base_tensor(source, "w")
    assert base is not None
    whole = repo.restored("w", base) if "w" in repo.manifest.tensors else base
    pieces = list(restored_pieces(repo, source, "w"))
    assert b"".join(map(bits, pieces)) == bits(whole)
    if not spec.startswith("svd") or change == "none":
        assert max(piece.numel() for piece in pieces) <= max(9, 13) * COLUMNS
        assert len(pieces) > 4
    assert bits(restored_tensor(repo, source, "w", None)) == bits(whole)
    # Straight from float32 where the codec is lossy: no rounding to the fine-tune's dtype between.
    wide = restored_tensor(repo, source, "w", torch.float32)
    assert wide.shape == whole.shape
    if "w" in repo.manifest.tensors and not repo.exact("w"):
        expected = repo.delta("w", base)
        shared = min(len(base), len(expected))
        expected[:shared] += base[:shared].float()
        assert torch.equal(wide, expected)
    else:
        assert torch.equal(wide, whole.float())


def test_a_piece_that_came_back_otherwise_is_told_at_the_end(tmp_path):
    repo, _ = packed(tmp_path, "all", "lossless")
    other = write_checkpoint(tmp_path / "other", {"w": torch.zeros(ROWS, COLUMNS).bfloat16()})
    pieces = restored_pieces(repo, Checkpoint.open(other), "w")
    with pytest.raises(DeltafoldError, match="did not come back") as caught:
        list(pieces)
    assert caught.value.code == "checksum"


def test_damage_is_told_before_the_first_piece(tmp_path):
    packed(tmp_path, "all", "int")
    path = tmp_path / "out" / "delta.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    repo, source = DeltaRepo.open(tmp_path / "out"), Checkpoint.open(tmp_path / "base")
    with pytest.raises(DeltafoldError) as caught:
        next(restored_pieces(repo, source, "w"))
    assert caught.value.code == "checksum"


def test_a_checkpoint_is_restored_in_pieces(tmp_path):
    packed(tmp_path, "few", "lossless")
    report = restore_checkpoint(tmp_path / "out", tmp_path / "base", tmp_path / "again")
    assert (report.tensors, report.exact) == (1, 1)
    again = Checkpoint.open(tmp_path / "again").tensor("w")
    assert bits(again) == bits(Checkpoint.open(tmp_path / "variant").tensor("w"))
