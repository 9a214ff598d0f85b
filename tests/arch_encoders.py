"""Tiny random models that do not generate, and what the pooling engine makes of each.

A family says its class and configuration; everything else (inputs, towers, padding) is what `Encoder`
finds out. `arch_table.document` writes the page of both tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 96
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_PICTURE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_STAGES: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1]}


@dataclass(frozen=True)
class Encoder:
    """One family.

    Attributes:
        name: of its bare class without "Model".
        config: its configuration's arguments.
        rebuilt: the tensor (its name's end) for which a variant gets a dense model of its own; empty
            where deltas are applied to the shared one.
        why: what stands in the way.
        still: ends of the names of tensors that no request asks for and training leaves alone. A
            variant that moves one is rebuilt.
    """

    name: str
    config: dict[str, Any] = field(default_factory=lambda: _TEXT)
    rebuilt: str = ""
    why: str = ""
    still: tuple[str, ...] = ()

    def is_still(self, name: str) -> bool:
        """Whether fine-tunes leave a tensor as it is."""
        return name.endswith(self.still) if self.still else False

    @property
    def cls(self) -> Any:
        """The bare class."""
        return getattr(transformers, f"{self.name}Model")

    def build(self) -> Any:
        """A random float32 model whose vectors are random too."""
        torch.manual_seed(0)
        model = self.cls(self.cls.config_class(**self.config)).to(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        return model.eval()


def _pair(text: dict[str, Any], **both: Any) -> dict[str, Any]:
    return {"text_config": {**_TEXT, **text}, "vision_config": _PICTURE, **both}


ENCODERS = [
    Encoder("Bert"),
    Encoder("Roberta", {**_TEXT, "pad_token_id": 1}),
    Encoder("XLMRoberta", {**_TEXT, "pad_token_id": 1}),
    Encoder("Electra", {**_TEXT, "embedding_size": 16}),
    Encoder("Albert", {**_TEXT, "embedding_size": 16}),
    Encoder(
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    Encoder("Deberta", {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    Encoder(
        "DebertaV2",
        {
            **_TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "conv_kernel_size": 3,
        },
    ),
    Encoder("MPNet", {**_TEXT, "pad_token_id": 1}),
    Encoder(
        "ModernBert",
        {
            **_TEXT,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "cls_token_id": 4,
            "sep_token_id": 5,
        },
    ),
    Encoder("LayoutLM", {**_TEXT, "max_2d_position_embeddings": 32}),
    Encoder(
        "Funnel",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
        },
    ),
    Encoder(
        "Esm",
        {**_TEXT, "pad_token_id": 1},
        still=("contact_head.regression.weight", "contact_head.regression.bias"),
    ),
    Encoder("FNet"),
    Encoder(
        "T5Encoder",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
        },
    ),
    Encoder(
        "SwitchTransformersEncoder",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
        },
        rebuilt="expert_3.wi.weight",
        why="no token of the warm-up reaches that expert",
    ),
    Encoder(
        "Bart",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    Encoder("Llama", {**_TEXT, "num_key_value_heads": 2}),
    Encoder(
        "Mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    Encoder("ViT", _PICTURE),
    Encoder("DeiT", _PICTURE),
    Encoder("Dinov2", _PICTURE),
    Encoder("Beit", {**_PICTURE, "use_relative_position_bias": True}),
    Encoder(
        "Swin",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 2,
        },
    ),
    Encoder("ConvNext", {**_STAGES, "image_size": 32, "num_stages": 2}),
    Encoder("ConvNextV2", {**_STAGES, "image_size": 32, "num_stages": 2}),
    Encoder(
        "PoolFormer",
        {
            "hidden_sizes": [16, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
    ),
    Encoder(
        "Levit",
        {
            "image_size": 32,
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "mlp_ratio": [2, 2, 2],
            "attention_ratio": [2, 2, 2],
        },
        rebuilt="attention_biases",
        why="the first pass picks a table of it, which is kept",
    ),
    Encoder("ResNet", {**_STAGES, "embedding_size": 16, "layer_type": "basic"}),
    Encoder("CLIP", _pair({"projection_dim": 16}, projection_dim=16)),
    Encoder("Siglip", _pair({"projection_size": 32})),
    Encoder(
        "XLNet",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        rebuilt="layer_1.bias",
        why="tokens are in front, not requests",
    ),
    Encoder("NomicBert", rebuilt="Wqkv.weight", why="the loader splits it in three"),
]

_HEAD = """\

## Models that do not generate

What `PoolingEngine` makes of bare models, written from `tests/arch_encoders.py` and held to the truth
by `tests/runtime/test_encoder_architectures.py` in the same way: rows of the base are bit for bit the
plain model's, lossy and lossless rows answer as restored dense models do, and texts of different
lengths share a batch. Heads come on top; see [serving.md](serving.md).

*Idle* are tensors that have no say in any answer to such requests, as moving them has shown: the token
for masked patches in training, the scale between texts and images. A variant may bring other ones.
What a module holds that did not run at the start is not taken for idle, nor is what a model read in its
first pass alone: a variant that changed it is rebuilt.
Nothing is remembered here, so state space models are applied too. What is rebuilt has a forward pass of
its own beside the shared model's.

| architecture | reads | products | tables | run again for a variant's rows | idle | served |
|---|---|---|---|---|---|---|
"""


def document() -> str:
    """The part of `docs/architectures.md` that is about these models."""
    return _HEAD + "".join(f"| {' | '.join(_line(e))} |\n" for e in ENCODERS)


def _line(family: Encoder) -> list[str]:
    from deltafold.runtime.embedded import trunk
    from deltafold.runtime.layers import is_embedding, is_linear
    from deltafold.runtime.slots import SlotMap

    model = family.build()
    encoder, slots = trunk.Encoder.of(model), SlotMap(model)
    slots.observe(model, encoder.inputs, find_idle=True)
    saved = [n for n in model.state_dict() if n in slots.slots]
    modules = {h.name: h.module for n in saved for h in slots.homes(n)}
    products = {n for n, m in modules.items() if is_linear(m)}
    tables = {n for n, m in modules.items() if is_embedding(m)}
    again = sorted({type(m).__name__ for n, m in modules.items() if n not in products | tables})
    idle = sorted({n.rpartition(".")[2] for n in saved if slots.is_idle([n])})
    still = " and ".join(f"`{name}`" for name in family.still)
    served = f"rebuilt if {still} moved" if still else "applied"
    served = f"rebuilt: `{family.rebuilt}`, {family.why}" if family.rebuilt else served
    reads = {"text": "texts", "image": "images"}
    return [
        family.name,
        ", ".join(reads[way] for way in encoder.ways),
        str(len(products)),
        str(len(tables)),
        ", ".join(f"`{n}`" for n in again),
        ", ".join(f"`{n}`" for n in idle),
        served,
    ]
