"""Tiny random models that write from texts, images or sounds, and what is made of their fine-tunes.

Like `arch_table`, whose page has this table too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 96
#: Stands for a piece of an image among the tokens.
IMAGE = 90

_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "init_std": 0.3,
}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_GRIDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "text_config": {**_TEXT, "rope_parameters": _ROPE},
}


@dataclass(frozen=True)
class Sequence:
    """One family.

    Attributes:
        name: as the table shows it.
        cls: its class in transformers.
        reads: what its requests bring: "text", "sound", "image", "image and text".
        config: makes its configuration.
        shape: of what it reads besides text, for one request.
        tokens: image tokens in front of a text; 0 for images that are not among the tokens.
        still: ends of the names of tensors that no training moves (fixed tables, biases kept at
            zero), which the model reads around their modules. A variant that moves one is rebuilt.
    """

    name: str
    cls: str
    reads: str
    config: Callable[[], Any]
    shape: tuple[int, ...] = ()
    tokens: int = 0
    still: tuple[str, ...] = field(default=())

    @property
    def kind(self) -> Any:
        """The class itself."""
        return getattr(transformers, self.cls)

    def build(self) -> Any:
        """A random float32 model whose vectors are random too."""
        torch.manual_seed(0)
        model = self.kind(self.config()).to(torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith(self.still or ("\0",)):
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        return model.eval()

    def request(self, length: int, noise: torch.Generator) -> dict[str, torch.Tensor]:
        """What one request brings, without a batch dimension; texts have `length` words."""
        words = torch.randint(4, IMAGE - 1, (length,), generator=noise)
        text = {"input_ids": words} if "text" in self.reads else {}
        signal = torch.randn(self.shape, generator=noise) if self.shape else torch.empty(0)
        if self.reads == "sound":
            return {"input_features": signal}
        if self.name == "Pix2Struct":
            places = torch.tensor([[1.0, 1], [1, 2], [2, 1], [2, 2]])
            return {"flattened_patches": torch.cat([places, signal], dim=1)}
        if "image" not in self.reads:
            return text
        if self.tokens:
            text["input_ids"] = torch.cat([torch.full((self.tokens,), IMAGE), words])
            kinds = (text["input_ids"] == IMAGE).long()
            if self.name.startswith("Qwen"):
                text |= {"mm_token_type_ids": kinds, "image_grid_thw": torch.tensor([1, 4, 4])}
            elif self.name in ("Gemma3", "PaliGemma"):
                text["token_type_ids"] = kinds
        return {**text, "pixel_values": signal}


def _t5(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**{**_T5, **changes})


def _bart(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**{**_BART, **changes})


def _seeing(name: str, text: str, vision: str, **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        own = getattr(transformers, f"{text}Config")(**_TEXT)
        extra = {"vision_use_head": False} if "Siglip" in vision else {}
        eyes = getattr(transformers, f"{vision}Config")(**_VISION, **extra)
        kind = getattr(transformers, f"{name}Config")
        parts = {"text_config": own.to_dict(), "vision_config": eyes.to_dict()}
        return kind(**parts, image_token_index=IMAGE, **changes)

    return make


def _whisper() -> Any:
    return transformers.WhisperConfig(
        **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
    )


def _grids(name: str, **vision: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**_GRIDS, vision_config=vision)


def _pair() -> Any:
    writer = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        add_cross_attention=True,
        is_decoder=True,
    )
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**_VISION), writer
    )
    both.decoder_start_token_id, both.pad_token_id, both.eos_token_id = 3, 0, 2
    return both


def _pix2struct() -> Any:
    own = {"d_kv": 8, "d_ff": 48, "hidden_size": 32}
    return transformers.Pix2StructConfig(
        text_config={
            **own,
            "vocab_size": VOCABULARY,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        vision_config={
            **own,
            "patch_embed_hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "seq_len": 32,
        },
        tie_word_embeddings=False,
    )


SEQUENCES = [
    Sequence("T5", "T5ForConditionalGeneration", "text", _t5("T5")),
    Sequence(
        "MT5",
        "MT5ForConditionalGeneration",
        "text",
        _t5("MT5", tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    ),
    Sequence(
        "Bart", "BartForConditionalGeneration", "text", _bart("Bart"), still=("final_logits_bias",)
    ),
    Sequence(
        "Marian",
        "MarianMTModel",
        "text",
        _bart("Marian", decoder_start_token_id=1),
        still=("final_logits_bias",),
    ),
    Sequence(
        "Whisper",
        "WhisperForConditionalGeneration",
        "sound",
        _whisper,
        shape=(8, 32),
    ),
    Sequence(
        "VisionEncoderDecoder", "VisionEncoderDecoderModel", "image", _pair, shape=(3, 16, 16)
    ),
    Sequence(
        "Pix2Struct", "Pix2StructForConditionalGeneration", "image", _pix2struct, shape=(4, 48)
    ),
    Sequence(
        "Llava",
        "LlavaForConditionalGeneration",
        "image and text",
        _seeing("Llava", "Llama", "CLIPVision"),
        shape=(3, 16, 16),
        tokens=4,
    ),
    Sequence(
        "PaliGemma",
        "PaliGemmaForConditionalGeneration",
        "image and text",
        _seeing("PaliGemma", "Gemma", "SiglipVision", projection_dim=32),
        shape=(3, 16, 16),
        tokens=4,
    ),
    Sequence(
        "Gemma3",
        "Gemma3ForConditionalGeneration",
        "image and text",
        _seeing("Gemma3", "Gemma3Text", "SiglipVision", mm_tokens_per_image=4),
        shape=(3, 16, 16),
        tokens=4,
    ),
    Sequence(
        "Qwen2VL",
        "Qwen2VLForConditionalGeneration",
        "image and text",
        _grids(
            "Qwen2VL",
            embed_dim=32,
            hidden_size=32,
            depth=2,
            num_heads=4,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        shape=(16, 96),
        tokens=4,
    ),
    Sequence(
        "Qwen2_5_VL",
        "Qwen2_5_VLForConditionalGeneration",
        "image and text",
        _grids(
            "Qwen2_5_VL",
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=48,
            depth=2,
            num_heads=4,
            patch_size=4,
            window_size=16,
            fullatt_block_indexes=[1],
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        shape=(16, 96),
        tokens=4,
    ),
]


def greedy(model: Any, inputs: dict[str, torch.Tensor], new: int) -> list[int]:
    """What transformers writes for one request."""
    return greedy_with_logprobs(model, inputs, new)[0]


def greedy_with_logprobs(
    model: Any, inputs: dict[str, torch.Tensor], new: int
) -> tuple[list[int], torch.Tensor]:
    """The tokens, and their log-probabilities `[new]`."""
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"forced_eos_token_id": None, "max_length": None}
    model.generation_config.eos_token_id = None
    if "input_ids" in inputs:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    out = transformers.GenerationMixin.generate(
        model, **inputs, **settings, return_dict_in_generate=True, output_logits=True
    )
    tokens = out.sequences[0, -new:]
    told = torch.cat(out.logits).log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens.tolist(), told


_HEAD = """\

## Models that read first and write then

What `EmbeddedEngine` makes of models with an encoder, and of those that see, written from
`tests/arch_sequences.py` and held to the truth by `tests/runtime/test_sequence_architectures.py`: in
batches of base, lossy and lossless rows, teacher-forced logits are those of restored dense models, and
texts of several lengths in one batch are continued with the dense models' tokens and
log-probabilities. Rows of the base are bit for bit the plain model's.

One tensor no training moves: a bias on the scores, kept at zero, which the model adds outside its
modules. A variant that does move it is rebuilt.

| architecture | reads | products | tables | run again for a variant's rows | served |
|---|---|---|---|---|---|
"""


def document() -> str:
    """The part of `docs/architectures.md` that is about these models."""
    return _HEAD + "".join(f"| {' | '.join(_line(f))} |\n" for f in SEQUENCES)


def _line(family: Sequence) -> list[str]:
    from arch_homes import homes_of

    served = [*(f"rebuilt if `{name}` was moved" for name in family.still)]
    return [
        family.name,
        family.reads,
        *homes_of(family.build()),
        served[0] if served else "applied",
    ]
