"""A tiny random base, fine-tunes of it, packed deltas, and the restored dense models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltafold.compress import Recipe, compress_checkpoint, parse_spec, restore_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
#: Biases on q, k and v and tied embeddings come with Qwen2, norms of q and k with Qwen3.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"tie_word_embeddings": True},
}
#: One variant a codec.
CODECS = {
    "sign1": "bitdelta",
    "sign3": "bitdelta:bits=3,group=32",
    "dare": "dare:drop=0.5",
    "int4": "int:bits=4,group=32",
    "rank8": "svd:rank=8",
    "exact": "lossless",
}


@dataclass(frozen=True)
class Models:
    """Folders: the base, the zoo, and under `dense` a float32 checkpoint a variant."""

    base: Path
    zoo: Path
    dense: Path
    variants: tuple[str, ...]

    def plain(self, name: str = "base") -> Any:
        """A model as transformers loads it, float32."""
        folder = self.base if name == "base" else self.dense / name
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return loaded.eval()


def tokenizer(folder: Path) -> None:
    """A character tokenizer with a chat template, saved to `folder`."""
    characters = ["<pad>", "<eos>", *(chr(c) for c in range(32, 32 + 126))]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    made.save_pretrained(folder)


def make(
    folder: Path,
    family: str = "Llama",
    *,
    codecs: dict[str, str] = CODECS,
    dtype: torch.dtype = torch.bfloat16,
    step: float = 0.05,
    **changes: Any,
) -> Models:
    """Build everything under `folder`; each fine-tune moves every tensor by `step` times noise."""
    torch.manual_seed(0)
    sizes = {**SIZES, **FAMILIES.get(family, {}), **changes}
    config = getattr(transformers, f"{family}Config")(
        **{name: value for name, value in sizes.items() if value is not ...}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder / "base")
    tokenizer(folder / "base")
    for name, codec in codecs.items():
        fine_tune(folder, name, step=step)
        pack(folder, name, codec)
    return Models(folder / "base", folder / "zoo", folder / "dense", tuple(codecs))


def fine_tune(folder: Path, name: str, *, step: float = 0.05) -> Path:
    """A fine-tune in `folder/full/name`: the base with every tensor moved."""
    out = folder / "full" / name
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    noise = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in base.parameters():
            move = torch.randn(parameter.shape, generator=noise) * step
            parameter.add_(move.to(parameter.dtype))
    base.save_pretrained(out)
    tokenizer(out)
    return out


def pack(folder: Path, name: str, codec: str) -> Path:
    """Pack `folder/full/name` into the zoo and restore it as float32 under `dense`."""
    delta = folder / "zoo" / name
    compress_checkpoint(
        folder / "base", folder / "full" / name, delta, recipe=Recipe(default=parse_spec(codec))
    )
    restore_checkpoint(delta, folder / "base", folder / "dense" / name, dtype=torch.float32)
    return delta
