"""Tiny random checkpoints in the Hugging Face layout, written without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
VOCABULARY, WIDTH = 48, 40
QUERY = "model.layers.0.self_attn.q_proj.weight"
_SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, WIDTH),
    "model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.self_attn.q_proj.bias": (WIDTH,),
    "model.layers.0.mlp.experts.down_proj": (3, 24, WIDTH),
    "model.layers.0.mlp.up_proj.weight": (72, WIDTH),
    "model.layers.0.input_layernorm.weight": (WIDTH,),
    "model.patch.conv.weight": (6, 3, 3, 3),
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (VOCABULARY, WIDTH),
    "logit_scale": (),
}


def base_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    """Random weights of every kind: matrices, stacks, convolutions, vectors, a scalar, integers."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=draw).mul(0.1).to(dtype)
        for name, shape in _SHAPES.items()
    }
    tensors["model.position_ids"] = torch.arange(16).reshape(1, 16)
    return tensors


def fine_tuned(base: Mapping[str, torch.Tensor], seed: int = 1, scale: float = 0.01) -> Tensors:
    """Every floating-point tensor moved a little; integers as they were."""
    draw = torch.Generator().manual_seed(seed)

    def moved(value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value.clone()
        step = torch.randn(value.shape, generator=draw) * scale
        return (value.float() + step).to(value.dtype)

    return {name: moved(value) for name, value in base.items()}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    words: tuple[str, ...] = ("a", "b"),
    config: Mapping[str, object] | None = None,
) -> Path:
    """A checkpoint folder with a configuration and a tokenizer; in shards with an index if asked."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "pico"}))
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    if shards == 1:
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = sorted(contiguous), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        save_file({name: contiguous[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_checkpoint(folder: Path) -> Tensors:
    """Every tensor of a checkpoint folder."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes: equal where two tensors are the same bit for bit, NaN and -0 included."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert bits(found[name]) == bits(value), name


@dataclass
class Pair:
    """A base and a fine-tune on disk, and their tensors."""

    root: Path
    base: Path
    variant: Path
    base_tensors: Tensors
    variant_tensors: Tensors

    @property
    def out(self) -> Path:
        """Where a test packs to."""
        return self.root / "out" / "delta"

    def rewrite(
        self, *, words: tuple[str, ...] = ("a", "b"), **changes: torch.Tensor | None
    ) -> None:
        """Write the fine-tune again with some tensors replaced, added, or (None) left out.

        Names are given with `__` for a dot.
        """
        for name, value in changes.items():
            name = name.replace("__", ".")
            self.variant_tensors.pop(name, None)
            if value is not None:
                self.variant_tensors[name] = value
        write_checkpoint(self.variant, self.variant_tensors, words=words)


def make_pair(root: Path, dtype: torch.dtype = torch.bfloat16, *, shards: int = 1) -> Pair:
    """A base and a fine-tune under `root`."""
    base = base_tensors(dtype)
    variant = fine_tuned(base)
    return Pair(
        root,
        write_checkpoint(root / "base", base, shards=shards),
        write_checkpoint(root / "variant", variant, shards=shards),
        base,
        variant,
    )


def wide_pair(root: Path) -> Pair:
    """A base and a fine-tune whose layers are wide enough for blocks of 64."""
    pair = make_pair(root)
    draw = torch.Generator().manual_seed(1)

    def tensors(start: Tensors | None) -> Tensors:
        shapes = {
            "model.embed_tokens.weight": (96, 128),
            QUERY: (128, 128),
            "model.layers.0.mlp.down_proj.weight": (128, 192),
            "model.layers.0.mlp.odd_proj.weight": (128, 100),
            "model.layers.0.mlp.gate.weight": (8, 128),
            "model.layers.0.mlp.experts.0.up_proj.weight": (64, 128),
            "model.layers.0.input_layernorm.weight": (128,),
            "lm_head.weight": (96, 128),
        }
        made = {}
        for name, shape in shapes.items():
            step = torch.randn(shape, generator=draw) * (0.1 if start is None else 0.01)
            made[name] = (step if start is None else start[name].float() + step).bfloat16()
        return made

    pair.base_tensors = tensors(None)
    pair.variant_tensors = tensors(pair.base_tensors)
    # A tensor that was not trained still has to be repaired.
    down = "model.layers.0.mlp.down_proj.weight"
    pair.variant_tensors[down] = pair.base_tensors[down].clone()
    config = {"model_type": "pico", "vocab_size": 96}
    write_checkpoint(pair.base, pair.base_tensors, config=config)
    write_checkpoint(pair.variant, pair.variant_tensors, config=config)
    return pair
