"""The real PEFT: what it saves is imported as it merges it, and what is exported it loads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deltafold.compress import (
    DeltafoldError,
    Recipe,
    compress_checkpoint,
    export_peft,
    import_lora,
    parse_spec,
    restore_checkpoint,
)

peft: Any = pytest.importorskip("peft")

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
IDS = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_SIZES)),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**_GPT, n_positions=64)),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    ),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**_SIZES)),
    "vit": (
        transformers.ViTModel,
        transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
    ),
}
#: The model, and the options of PEFT's LoraConfig.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 12}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
    ),
    "dora": ("llama", {"target_modules": ["k_proj", "up_proj"], "use_dora": True}),
    "table": ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "tied": (
        "qwen2",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-dora": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "biases": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "all-biases": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "conv2d": ("vit", {"target_modules": ["projection"]}),
}


def made(kind: str, folder: Path) -> Any:
    cls, config = CLASSES[kind]
    torch.manual_seed(0)
    model = cls(config).eval()
    model.save_pretrained(folder)
    return cls


def noisy(model: Any, seed: int = 2) -> None:
    """Give everything that is trained another value."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += torch.randn(value.shape, generator=noise) * 0.1


def adapted(cls: Any, base: Path, out: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Save an adapter with PEFT, and give the weights that PEFT merges it to."""
    config = peft.LoraConfig(r=4, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dtypes, ties and layouts, which it then handles
        model = peft.get_peft_model(cls.from_pretrained(base, dtype=torch.float32), config)
        noisy(model)
        model.save_pretrained(out)
        merged = model.merge_and_unload()
    return {name: value.clone() for name, value in merged.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_is_imported_as_peft_merges_it(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    cls = made(kind, tmp_path / "base")
    expected = adapted(cls, tmp_path / "base", tmp_path / "lora", options)
    report = import_lora(tmp_path / "base", tmp_path / "lora", tmp_path / "delta")
    restore_checkpoint(
        tmp_path / "delta", tmp_path / "base", tmp_path / "restored", dtype=torch.float32
    )
    found = cls.from_pretrained(tmp_path / "restored", dtype=torch.float32).state_dict()
    plain = cls.from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    moved = {n for n, value in expected.items() if not torch.equal(value, plain[n])}
    assert moved, "the adapter does something"
    stored = moved - {"lm_head.weight"} if kind == "qwen2" else moved
    assert len(report.manifest.tensors) == len(stored), "a tied table is stored once"
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-6 * max(1.0, float(value.abs().max())), name
        assert name in moved or torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_peft_loads_what_is_exported(kind: str, tmp_path: Path) -> None:
    """At full rank the model is the fine-tune: norms, tables, biases and head included."""
    cls = made(kind, tmp_path / "base")
    tuned = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
    if kind == "gpt2":
        tuned.transformer.wte.requires_grad_(False)
    noisy(tuned)
    tuned.save_pretrained(tmp_path / "full")
    recipe = Recipe(default=parse_spec("lossless"))
    compress_checkpoint(tmp_path / "base", tmp_path / "full", tmp_path / "delta", recipe=recipe)
    export_peft(tmp_path / "delta", tmp_path / "base", tmp_path / "lora", rank=48)
    plain = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    again = peft.set_peft_model_state_dict(loaded, peft.load_peft_weights(tmp_path / "lora"))
    assert not again.unexpected_keys
    with torch.inference_mode():
        found, expected = loaded(IDS).logits, tuned.eval()(IDS).logits
        before = cls.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()(IDS).logits
    assert (found - expected).abs().max() < 1e-4 * float(expected.abs().max())
    assert (before - expected).abs().max() > 1e-2


def test_a_tie_that_peft_does_not_keep_is_refused(tmp_path: Path) -> None:
    """PEFT ties by name, and would leave GPT-2's output layer with the base's table."""
    cls = made("gpt2", tmp_path / "base")
    tuned = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
    noisy(tuned)
    tuned.save_pretrained(tmp_path / "full")
    compress_checkpoint(tmp_path / "base", tmp_path / "full", tmp_path / "delta")
    with pytest.raises(DeltafoldError, match=r"transformer\.wte\.weight") as caught:
        export_peft(tmp_path / "delta", tmp_path / "base", tmp_path / "lora")
    assert caught.value.code == "engine-unsupported"
    assert "wpe" not in str(caught.value)
    export_peft(tmp_path / "delta", tmp_path / "base", tmp_path / "lora", drop=["*wte*"])
