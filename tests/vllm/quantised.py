"""A quantised copy of a tiny base, and what each variant is on it, as a plain dense checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32


def make(base: Path, out: Path) -> None:
    """Linear layers in 4 bits, in the format of compressed-tensors (`pack-quantized`)."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(base / "model.safetensors").items():
        if _is_quantised(name):
            codes, scales = _codes(value)
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.weight_packed"] = _packed(codes)
            tensors[f"{stem}.weight_scale"] = scales
            tensors[f"{stem}.weight_shape"] = torch.tensor(value.shape)
        else:
            tensors[name] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text("utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": _CONFIG}))


def dense(base: Path, variant: Path) -> None:
    """Rewrite a variant's dense checkpoint as the dequantised base plus the variant's difference."""
    own, plain = load_file(variant / "model.safetensors"), load_file(base / "model.safetensors")
    for name, value in plain.items():
        if _is_quantised(name):
            codes, scales = _codes(value)
            rounded = codes.to(torch.float32) * scales.repeat_interleave(GROUP, dim=1)
            own[name] = rounded + own[name] - value
    save_file(own, variant / "model.safetensors", {"format": "pt"})


def _is_quantised(name: str) -> bool:
    return name.endswith("_proj.weight")


def _codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 in [-8, 7] and float32 scales `[N, K / GROUP]`."""
    grouped = weight.reshape(len(weight), -1, GROUP)
    scales = grouped.abs().amax(dim=-1) / 7
    codes = (grouped / scales.unsqueeze(-1)).round().clamp(-8, 7)
    return codes.reshape(weight.shape).to(torch.int32), scales


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes an int32, the first in the lowest bits."""
    fields = (codes + 8).reshape(len(codes), -1, 8).to(torch.int64)
    words = sum(fields[..., i] << (4 * i) for i in range(8))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "dynamic": False,
            },
        }
    },
}
