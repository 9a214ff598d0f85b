"""Steps on rows and columns that were made elsewhere."""

from __future__ import annotations

import hashlib

import pytest
import torch
from checkpoints import Pair, bits, read_checkpoint
from packing import MATRIX
from safetensors.torch import save_file

from deltafold.compress import DeltafoldError, DeltaRepo, restore_checkpoint, verify_delta
from deltafold.compress.blocks import import_blocks

UP = "model.layers.0.mlp.up_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def steps() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        f"{UP}.rows.index": torch.tensor([40, 3, 7]),
        f"{UP}.rows.values": torch.randn(3, 40, generator=draw),
        f"{MATRIX}.columns.index": torch.tensor([0, 39], dtype=torch.int32),
        f"{MATRIX}.columns.values": torch.randn(40, 2, generator=draw).to(torch.bfloat16),
        f"{MATRIX}.rows.index": torch.tensor([5], dtype=torch.uint8),
        f"{MATRIX}.rows.values": torch.randn(1, 40, generator=draw),
        f"{BIAS}.rows.index": torch.tensor([2]),
        f"{BIAS}.rows.values": torch.tensor([0.25]),
    }


def test_they_are_added_to_the_base(pair: Pair):
    path = pair.root / "steps.safetensors"
    save_file(steps(), path)
    import_blocks(pair.base, path, pair.out)
    report = verify_delta(pair.out, base=pair.base, full=True)
    assert report.coded == 3
    repo, given = DeltaRepo.open(pair.out), steps()
    expected = torch.zeros(72, 40)
    expected[[40, 3, 7]] = given[f"{UP}.rows.values"]
    assert torch.equal(repo.delta(UP, pair.base_tensors[UP]), expected)
    both = torch.zeros(40, 40)
    both[5] = given[f"{MATRIX}.rows.values"]
    both[:, [0, 39]] += given[f"{MATRIX}.columns.values"].float()
    assert [t.id for t in repo.terms(MATRIX)] == ["rows", "columns"]
    assert torch.equal(repo.delta(MATRIX, pair.base_tensors[MATRIX]), both)
    restore_checkpoint(pair.out, pair.base, pair.root / "restored")
    found = read_checkpoint(pair.root / "restored")
    merged = (pair.base_tensors[MATRIX].float() + both).to(torch.bfloat16)
    assert bits(found[MATRIX]) == bits(merged)
    assert bits(found["lm_head.weight"]) == bits(pair.base_tensors["lm_head.weight"])


def test_the_manifest_says_where_they_come_from(pair: Pair):
    path = pair.root / "steps.safetensors"
    save_file(steps(), path)
    manifest = import_blocks(pair.base, path, pair.out).manifest
    assert manifest.recipe["provenance"] == {
        "produced": "outside",
        "file": "steps.safetensors",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert manifest.variant.name == "steps"
    assert manifest.codec_summary() == "blocks"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"other.rows.index": torch.tensor([0])}, "unexpected-tensor"),
        ({f"{UP}.rows.scale": torch.tensor([1.0])}, "unexpected-tensor"),
        ({"loose": torch.tensor([1.0])}, "unexpected-tensor"),
        ({f"{UP}.columns.index": torch.tensor([0])}, "coverage"),
        ({f"{UP}.rows.index": torch.tensor([3, 3, 7])}, "bad-argument"),
        ({f"{UP}.rows.index": torch.tensor([3, 72, 7])}, "shape-mismatch"),
        ({f"{UP}.rows.index": torch.tensor([3, -1, 7])}, "shape-mismatch"),
        ({f"{UP}.rows.index": torch.tensor([3, 7])}, "shape-mismatch"),
        ({f"{UP}.rows.index": torch.tensor([3.0, 7.0, 8.0])}, "shape-mismatch"),
        ({f"{UP}.rows.values": torch.zeros(3, 41)}, "shape-mismatch"),
        ({f"{UP}.rows.values": torch.zeros(3, 40, dtype=torch.int32)}, "shape-mismatch"),
        ({f"{UP}.rows.values": torch.full((3, 40), float("nan"))}, "not-finite"),
        (
            {
                f"{BIAS}.columns.index": torch.tensor([0]),
                f"{BIAS}.columns.values": torch.zeros(40, 1),
            },
            "shape-mismatch",
        ),
    ],
)
def test_what_is_refused(pair: Pair, change, code):
    path = pair.root / "steps.safetensors"
    save_file({**steps(), **change}, path)
    with pytest.raises(DeltafoldError) as caught:
        import_blocks(pair.base, path, pair.out)
    assert caught.value.code == code
    assert not pair.out.exists()


def test_no_such_file(pair: Pair):
    with pytest.raises(DeltafoldError) as caught:
        import_blocks(pair.base, pair.root / "nothing", pair.out)
    assert caught.value.code == "not-found"
