"""PEFT LoRA folders as PEFT writes them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
#: What PEFT writes for an ordinary LoRA, options of later versions included.
PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], *, prefix: str = PREFIX, **config: Any
) -> Path:
    """A LoRA folder; tensors are named without PEFT's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    named = {prefix + name: value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def factors(
    module: str, out: int, into: int, rank: int = 4, *, seed: int = 0, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    """Random `lora_A` and `lora_B` of one linear layer."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, into, generator=draw).mul(0.1).to(dtype),
        f"{module}.lora_B.weight": torch.randn(out, rank, generator=draw).mul(0.1).to(dtype),
    }


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration, and tensors named without PEFT's prefix."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, {name.removeprefix(PREFIX): value for name, value in tensors.items()}
