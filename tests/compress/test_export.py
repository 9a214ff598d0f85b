"""A delta as a PEFT folder: what it holds, what it loses and says so, and what is refused."""

from __future__ import annotations

import pytest
import torch
from adapters import factors, read_adapter, write_adapter
from checkpoints import Pair, make_pair, read_checkpoint, write_checkpoint

from deltafold.compress import (
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    export_peft,
    import_lora,
    parse_spec,
    restore_checkpoint,
)

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
BARE = ("model.layers.0.mlp.experts.down_proj", "logit_scale")
CONFIG = {"model_type": "pico", "vocab_size": 48}


@pytest.fixture
def packed(tmp_path) -> Pair:
    """A fine-tune packed losslessly; the base says how many words it knows."""
    pair = make_pair(tmp_path)
    write_checkpoint(pair.base, pair.base_tensors, config=CONFIG)
    write_checkpoint(pair.variant, pair.variant_tensors, config=CONFIG)
    compress_checkpoint(
        pair.base, pair.variant, pair.out, recipe=Recipe(default=parse_spec("lossless"))
    )
    return pair


def merged(pair, folder, *, accept=()):
    """What importing the exported folder restores to, float32."""
    again, restored = pair.root / "again", pair.root / "restored"
    import_lora(pair.base, folder, again, accept=accept)
    restore_checkpoint(again, pair.base, restored, dtype=torch.float32)
    return read_checkpoint(restored)


def test_full_rank_round_trip(packed):
    out = packed.root / "lora"
    report = export_peft(packed.out, packed.base, out, rank=40, drop=BARE)
    found = merged(packed, out)
    for name, value in packed.variant_tensors.items():
        expected = packed.base_tensors[name] if name in BARE else value
        torch.testing.assert_close(found[name], expected.to(found[name].dtype), rtol=0, atol=1e-5)
    assert report.of("lora") == [f"{UP}.weight", f"{Q}.weight"]
    assert report.of("bias") == [f"{Q}.bias"]
    assert sorted(report.of("dropped")) == sorted(BARE)
    assert "lm_head.weight" in report.of("saved")
    assert "model.patch.conv.weight" in report.of("saved")
    by_name = {t.tensor: t for t in report.tensors}
    assert by_name[f"{Q}.weight"].rel_error < 1e-5
    assert by_name[BARE[0]].rel_error == 1
    assert 0 < report.rel_error < 1


def test_the_folder_is_what_peft_reads(packed):
    out = packed.root / "lora"
    report = export_peft(packed.out, packed.base, out, rank=8, drop=BARE)
    config, tensors = read_adapter(out)
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 8
    assert config["target_modules"] == [UP, Q]
    assert config["modules_to_save"] == [
        *("lm_head", "model.embed_tokens", "model.layers.0.input_layernorm"),
        *("model.norm", "model.patch.conv"),
    ]
    assert config["bias"] == "all"
    assert not config["fan_in_fan_out"]
    assert tensors[f"{Q}.lora_A.weight"].shape == (8, 40)
    assert tensors[f"{UP}.lora_B.weight"].shape == (72, 8)
    assert f"{Q}.base_layer.bias" in tensors
    assert {p.name for p in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
    }
    delta = DeltaRepo.open(packed.out).delta(f"{UP}.weight", packed.base_tensors[f"{UP}.weight"])
    singular = torch.linalg.svdvals(delta)
    best = float(singular[8:].norm() / singular.norm())
    (error,) = [t.rel_error for t in report.tensors if t.tensor == f"{UP}.weight"]
    assert error == pytest.approx(best, rel=1e-3)


def test_a_lora_comes_back_as_it_was(tmp_path):
    pair = make_pair(tmp_path)
    tensors = factors(Q, 40, 40, rank=4) | factors(UP, 72, 40, rank=6)
    write_adapter(
        tmp_path / "lora", tensors, lora_alpha=4, rank_pattern={"up_proj": 6}, use_rslora=True
    )
    import_lora(pair.base, tmp_path / "lora", pair.out)
    report = export_peft(pair.out, pair.base, tmp_path / "exported", rank=4)
    config, found = read_adapter(tmp_path / "exported")
    assert config["rank_pattern"] == config["alpha_pattern"] == {UP: 6}
    assert torch.equal(found[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_A.weight"])
    assert torch.equal(found[f"{Q}.lora_B.weight"], tensors[f"{Q}.lora_B.weight"] * 2)
    assert report.rel_error < 1e-6
    import_lora(pair.base, tmp_path / "exported", tmp_path / "again")
    again = DeltaRepo.open(tmp_path / "again").manifest
    first = DeltaRepo.open(pair.out).manifest
    assert again.variant.fingerprint == first.variant.fingerprint
    assert again.tensors == first.tensors


def test_conv1d(tmp_path):
    """A bias of a column's length tells that weights are stored as [in, out]."""
    name, other = "h.0.mlp.c_fc", "h.0.attn.c_proj"
    draw = torch.Generator().manual_seed(0)
    base = {
        f"{name}.weight": torch.randn(8, 12, generator=draw),
        f"{name}.bias": torch.zeros(12),
        f"{other}.weight": torch.randn(8, 8, generator=draw),
        f"{other}.bias": torch.zeros(8),
    }
    tuned = {n: v + torch.randn(v.shape, generator=draw) for n, v in base.items()}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    compress_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    export_peft(tmp_path / "delta", tmp_path / "base", tmp_path / "lora", rank=8)
    config, tensors = read_adapter(tmp_path / "lora")
    assert config["fan_in_fan_out"]
    assert tensors[f"{name}.lora_A.weight"].shape == (8, 8)
    assert tensors[f"{name}.lora_B.weight"].shape == (12, 8)
    import_lora(tmp_path / "base", tmp_path / "lora", tmp_path / "again")
    one, two = DeltaRepo.open(tmp_path / "delta"), DeltaRepo.open(tmp_path / "again")
    for tensor in base:
        found, expected = (r.delta(tensor, base[tensor]) for r in (two, one))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_two_ways_of_storing_are_refused(tmp_path):
    base = {"a.weight": torch.ones(4, 6), "a.bias": torch.ones(4)}
    base |= {"b.weight": torch.ones(4, 6), "b.bias": torch.ones(6)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", {n: v + torch.rand(v.shape) for n, v in base.items()})
    compress_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    refused("engine-unsupported", tmp_path, tmp_path / "delta")
    export_peft(tmp_path / "delta", tmp_path / "base", tmp_path / "lora", drop=["b.*"])


def refused(code, root, delta, **options):
    with pytest.raises(DeltafoldError) as caught:
        export_peft(delta, root / "base", root / "lora", **options)
    assert caught.value.code == code
    assert not (root / "lora").exists()
    assert not (root / "lora.partial").exists()
    return caught.value


def test_refusals(packed):
    error = refused("engine-unsupported", packed.root, packed.out)
    assert BARE[0] in str(error)
    assert BARE[1] in str(error)
    assert "--drop" in error.fix
    assert "matches no tensor" in str(refused("bad-argument", packed.root, packed.out, drop=["x"]))
    refused("bad-argument", packed.root, packed.out, rank=0)
    write_checkpoint(packed.base, packed.variant_tensors)
    refused("base-mismatch", packed.root, packed.out, drop=BARE)


def test_new_resized_and_missing_tensors(tmp_path):
    pair = make_pair(tmp_path)
    for name in BARE:
        pair.variant_tensors[name] = pair.base_tensors[name]
    larger = torch.cat([pair.variant_tensors["lm_head.weight"], torch.zeros(2, 40).bfloat16()])
    pair.rewrite(lm_head__weight=larger, score__weight=torch.ones(2, 40), model__norm__weight=None)
    accept = ["resized", "new-tensors", "missing-tensors"]
    compress_checkpoint(pair.base, pair.variant, pair.out, accept=accept)
    error = refused("engine-unsupported", tmp_path, pair.out)
    for name in ("lm_head.weight", "score.weight", "model.norm.weight"):
        assert name in str(error)
    dropped = ["lm_head*", "score*"]
    assert "--to hf" in refused("engine-unsupported", tmp_path, pair.out, drop=dropped).fix


MOE = {
    "model.layers.0.mlp.gate.weight": (3, 8),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, 8),
    "model.layers.0.mlp.shared_expert.up_proj.weight": (6, 8),
    "model.layers.0.self_attn.k_proj.weight": (3, 8),
}
NUMBERED = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (6, 8) for i in range(3)}
FUSED = {"model.layers.0.mlp.experts.gate_up_proj": (3, 6, 8)}
NAMED = {f"model.layers.0.mlp.experts.expert_{i}.wi.weight": (6, 8) for i in range(3)}


@pytest.mark.parametrize("experts", [NUMBERED, FUSED], ids=["numbered", "fused"])
def test_experts_and_routers_are_refused(tmp_path, experts):
    """A model of transformers holds them as parameters, which PEFT does not find as linear layers."""
    delta = packed_of(tmp_path, MOE | experts)
    error = refused("engine-unsupported", tmp_path, delta)
    router = "model.layers.0.mlp.gate.weight"
    for name in (router, *experts):
        assert name in str(error)
    assert "shared" not in str(error)
    assert router in str(refused("engine-unsupported", tmp_path, delta, drop=["*.experts.*"]))
    report = export_peft(
        delta, tmp_path / "base", tmp_path / "lora", drop=["*.experts.*", "*.mlp.gate.*"]
    )
    assert set(report.of("lora")) == set(MOE) - {router}
    assert set(report.of("dropped")) == {router, *experts}


def test_experts_that_stay_modules_are_adapted(tmp_path):
    report = export_peft(packed_of(tmp_path, MOE | NAMED), tmp_path / "base", tmp_path / "lora")
    assert set(report.of("lora")) == set(MOE | NAMED)


def packed_of(root, shapes):
    """A delta that changes tensors of these shapes."""
    draw = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=draw) for n, s in shapes.items()}
    write_checkpoint(root / "base", base)
    write_checkpoint(root / "tuned", {n: v + torch.rand(v.shape) for n, v in base.items()})
    compress_checkpoint(root / "base", root / "tuned", root / "delta")
    return root / "delta"


def test_overwriting(packed):
    out = packed.root / "lora"
    export_peft(packed.out, packed.base, out, drop=BARE)
    with pytest.raises(DeltafoldError, match="exists"):
        export_peft(packed.out, packed.base, out, drop=BARE)
    export_peft(packed.out, packed.base, out, rank=3, drop=BARE, overwrite=True)
    assert read_adapter(out)[0]["r"] == 3


def test_tied_tables_stay_tied(packed):
    config = {**CONFIG, "tie_word_embeddings": True}
    write_checkpoint(packed.base, packed.base_tensors, config=config)
    out = packed.root / "lora"
    export_peft(packed.out, packed.base, out, drop=BARE)
    assert read_adapter(out)[0]["ensure_weight_tying"]
    merged(packed, out)
