"""Quantised bases: the arithmetic is bitsandbytes' own, and deltas against it come back whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import QUERY, Pair, read_checkpoint, wide_pair, write_checkpoint
from packing import LOSSLESS, restored

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    DeltaRepo,
    compress_checkpoint,
    export_peft,
    merge_deltas,
    parse_spec,
    verify_delta,
)
from deltafold.compress.calibration import decoded_tensors
from deltafold.compress.merges import Task
from deltafold.compress.quantized import NF4_LEVELS, dequantized, quantization_of, quantize
from deltafold.compress.recipe import Recipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bnb() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes").functional


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes, a block of zeros, and values half way between two levels."""
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(96, 320, generator=draw) * torch.rand(96, 1, generator=draw) * 0.1
    value[3, :64] = 0
    levels = torch.tensor(NF4_LEVELS)
    value[5, :15] = (levels[1:] + levels[:-1]) / 2
    value[5, 15], value[5, 16:64] = 1, 0
    value[6] = value[6] * 1e-30
    return value.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_is_what_bitsandbytes_makes_bit_for_bit(bnb: Any, dtype: torch.dtype) -> None:
    value = weights(dtype)
    packed = quantize("w", value, "nf4")
    codes, state = bnb.quantize_4bit(
        value.clone(), blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.absmax, state.absmax)
    state.dtype = torch.float32
    assert torch.equal(packed.values(), bnb.dequantize_4bit(codes, state))
    assert packed.nbytes == value.numel() // 2 + value.numel() // 64 * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_what_bitsandbytes_makes_bit_for_bit(bnb: Any, dtype: torch.dtype) -> None:
    value = weights(dtype)
    value[6] = value[7]  # 1e-30 is zero in float16, and bitsandbytes divides by it
    packed = quantize("w", value, "int8")
    codes, absmax, _ = bnb.int8_vectorwise_quant(value.to(torch.float16))
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.absmax, absmax)
    assert torch.equal(packed.values(), bnb.int8_vectorwise_dequant(codes, absmax))
    assert bool((quantize("w", torch.zeros(2, 64), "int8").values() == 0).all())


def test_values_that_cannot_be_held_are_refused() -> None:
    value = torch.full((2, 64), 1e6)
    quantize("w", value, "nf4")
    with pytest.raises(DeltafoldError, match="int8 cannot hold") as caught:
        quantize("w", value, "int8")
    assert caught.value.code == "not-finite"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return wide_pair(tmp_path)


def pack(pair: Pair, codec: str, method: str | None) -> DeltaRepo:
    recipe = LOSSLESS if codec == "lossless" else Recipe(default=parse_spec(codec))
    compress_checkpoint(
        pair.base, pair.variant, pair.out, recipe=recipe, base_quantization=method, overwrite=True
    )
    return DeltaRepo.open(pair.out)


def test_the_rule_takes_linear_layers_alone(pair: Pair) -> None:
    quantization = quantization_of(Checkpoint.open(pair.base), "nf4")
    assert quantization.tensors == ("model.layers.0.mlp.down_proj.weight", QUERY)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_lossless_delta_restores_the_fine_tune_bit_for_bit(pair: Pair, method: str) -> None:
    repo = pack(pair, "lossless", method)
    assert repo.manifest.format_version == "1.1"
    assert repo.quantised == {QUERY, "model.layers.0.mlp.down_proj.weight"}
    report = verify_delta(pair.out, base=pair.base, full=True)
    assert report.restored == report.coded
    found = restored(pair)
    assert all(torch.equal(found[n], v) for n, v in pair.variant_tensors.items())


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_lossy_delta_repairs_the_quantisation(pair: Pair, method: str) -> None:
    repo = pack(pair, "int:bits=8,group=32", method)
    found = restored(pair, dtype=torch.float32)
    for name in repo.quantised:
        original = pair.base_tensors[name]
        lost = (
            dequantized(name, original, repo.manifest.base_quantization.method) - original
        ).norm()
        missed = (found[name] - pair.variant_tensors[name].float()).norm()
        assert missed < 0.2 * lost, name
        # What the manifest says of the error is said of this difference.
        value = pair.variant_tensors[name].float()
        delta = value - dequantized(name, original, repo.manifest.base_quantization.method)
        assert float(missed / delta.norm()) == pytest.approx(repo.entry(name).rel_error, rel=1e-4)


def test_a_merge_takes_what_the_fine_tunes_changed_in_the_base_itself(pair: Pair) -> None:
    """Deltas of both kinds, one to the base and one to what its quantisation has left of it."""
    tensors = {n: v + 0.01 * torch.ones_like(v) for n, v in pair.variant_tensors.items()}
    other = write_checkpoint(pair.root / "other", tensors)
    deltas = [pair.root / "deltas" / name for name in ("repaired", "plain")]
    for variant, method, out in zip((pair.variant, other), ("nf4", None), deltas, strict=True):
        compress_checkpoint(pair.base, variant, out, recipe=LOSSLESS, base_quantization=method)
    wide = Recipe(default=parse_spec("scale:by=1+exact"))
    for several, steps in (
        (deltas, (pair.variant_tensors, tensors)),
        (deltas[:1], (pair.variant_tensors,)),
    ):
        merge_deltas(
            pair.base, several, pair.out, method=Task(scale=0.5), recipe=wide, overwrite=True
        )
        merged = DeltaRepo.open(pair.out)
        assert merged.manifest.base_quantization is None
        base = pair.base_tensors[QUERY]
        expected = sum(0.5 * (step[QUERY].float() - base.float()) for step in steps)
        assert (merged.delta(QUERY, base) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("codec", ["lossless", "int:bits=8,group=32"])
def test_a_decoded_model_is_the_restored_one(pair: Pair, codec: str) -> None:
    repo = pack(pair, codec, "nf4")
    decoded = decoded_tensors(Checkpoint.open(pair.base), repo)
    found = restored(pair, dtype=torch.float32)
    for name in repo.quantised:
        torch.testing.assert_close(decoded[name].float(), found[name], rtol=0, atol=1e-6)


def test_other_deltas_are_written_as_before(pair: Pair) -> None:
    repo = pack(pair, "bitdelta", None)
    data = json.loads((pair.out / "delta_config.json").read_text())
    assert "base_quantization" not in data
    assert (data["format_version"], repo.quantised) == ("1.0", frozenset())


def test_the_quantisation_is_part_of_the_identity(pair: Pair) -> None:
    pack(pair, "lossless", "nf4")
    path = pair.out / "delta_config.json"
    data = json.loads(path.read_text())
    data["base_quantization"]["method"] = "int8"
    path.write_text(json.dumps(data))
    with pytest.raises(DeltafoldError) as caught:
        DeltaRepo.open(pair.out)
    assert caught.value.code == "checksum"


@pytest.mark.parametrize(
    "wrong",
    [
        {"block": 32},
        {"tensors": ["lm_head.weight", QUERY]},
        {"tensors": ["model.layers.0.mlp.odd_proj.weight"]},
        {"tensors": ["nobody.weight"]},
    ],
    ids=["block", "order", "shape", "name"],
)
def test_a_quantisation_that_does_not_fit_is_refused(pair: Pair, wrong: dict[str, Any]) -> None:
    repo = pack(pair, "lossless", "nf4")
    quantization = repo.manifest.base_quantization
    assert quantization is not None
    if wrong.get("tensors", [""])[0].startswith("lm_head"):
        wrong = {"tensors": [QUERY, "lm_head.weight"]}
    changed = quantization.model_copy(
        update={k: tuple(v) if isinstance(v, list) else v for k, v in wrong.items()}
    )
    manifest = repo.manifest.model_copy(update={"base_quantization": changed})
    manifest = manifest.model_copy(update={"delta_id": manifest.content_digest()})
    (pair.out / "delta_config.json").write_text(json.dumps(manifest.to_json()))
    with pytest.raises(DeltafoldError) as caught:
        verify_delta(pair.out, base=pair.base)
    assert caught.value.code == "bad-manifest"


def test_a_lora_export_is_made_for_the_base_as_it_is(pair: Pair) -> None:
    pack(pair, "lossless", "nf4")
    out = pair.root / "lora"
    report = export_peft(pair.out, pair.base, out, rank=128, drop=["*.experts.*"])
    kinds = {t.tensor: t for t in report.tensors}
    step = pair.variant_tensors[QUERY].float() - pair.base_tensors[QUERY].float()
    assert kinds[QUERY].norm == pytest.approx(float(step.norm()), rel=1e-5)
    assert kinds[QUERY].rel_error < 1e-3
    assert kinds["model.layers.0.mlp.down_proj.weight"].norm < 1e-6
    tensors = read_checkpoint(out)
    prefix = f"base_model.model.{QUERY.removesuffix('.weight')}"
    product = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
    assert (product - step).abs().max() < 1e-5
