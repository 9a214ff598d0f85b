"""Tiny random models of many architectures, and what the embedded engine makes of each.

The table says what is expected; the test holds it against the truth, and `docs/architectures.md` is
written from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import arch_encoders
import arch_sequences
import torch
import transformers
from arch_homes import homes_of

# Threads of a pool cost more than they bring on matrices this small.
torch.set_num_threads(1)

VOCABULARY = 96
_SIZES: dict[str, Any] = {
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
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: of its configuration class without "Config".
        changes: to the common sizes; `...` leaves a size out.
        sizes: the common sizes.
        rebuilt: the tensor (its name's end) for which a variant gets a dense model of its own; empty
            where deltas are applied to the shared one.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: _SIZES)
    rebuilt: str = ""

    @property
    def experts(self) -> bool:
        """Whether tokens of several requests share products in its experts."""
        return self.changes.get("num_experts_per_tok", self.changes.get("moe_k", 0)) > 0

    def build(self) -> Any:
        """A random float32 model whose vectors are random too."""
        sizes = {k: v for k, v in {**self.sizes, **self.changes}.items() if v is not ...}
        config = getattr(transformers, f"{self.name}Config")(**sizes)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        return model.eval()


FAMILIES = [
    Family("Llama"),
    Family("Mistral", {"sliding_window": 16}),
    Family("Ministral", _SLIDING),
    Family("Qwen2", {"tie_word_embeddings": True}),
    Family("Qwen3", {"tie_word_embeddings": True}),
    Family("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 24}),
    Family("Qwen3Moe", _EXPERTS),
    Family("Mixtral", _EXPERTS),
    Family("DeepseekV2", _DEEPSEEK),
    Family("DeepseekV3", _DEEPSEEK),
    Family("Gemma", {"tie_word_embeddings": True}),
    Family("Gemma2", _SLIDING),
    Family("Gemma3Text", _SLIDING),
    Family("Phi"),
    Family("Phi3"),
    Family("Phimoe", _EXPERTS),
    Family("GPT2", sizes=_GPT),
    Family("GPTBigCode", sizes=_GPT),
    Family("GPTJ", {"rotary_dim": 4}, sizes=_GPT),
    Family("CodeGen", {"rotary_dim": 4}, sizes=_GPT),
    Family(
        "GPTNeo",
        {
            "attention_types": [[["global", "local"], 1]],
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 16,
        },
    ),
    Family("GPTNeoX"),
    Family("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("Falcon", {"new_decoder_architecture": False, "head_dim": ...}),
    Family("Bloom", {"n_head": 4, "n_layer": 2}),
    Family(
        "Mpt",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "hidden_size": ...,
            "num_attention_heads": ...,
            "num_hidden_layers": ...,
        },
    ),
    Family("Persimmon"),
    Family("Starcoder2"),
    Family("StableLm"),
    Family("Nemotron"),
    Family("Olmo"),
    Family("Olmo2"),
    Family("Olmo3", _SLIDING),
    Family("Olmoe", _EXPERTS),
    Family("Granite"),
    Family("GraniteMoe", _EXPERTS),
    Family("Cohere"),
    Family("Cohere2", _SLIDING),
    Family("Glm"),
    Family("Glm4"),
    Family("Glm4Moe", {**_DEEPSEEK, "num_key_value_heads": 2}),
    Family("SmolLM3"),
    Family("GptOss", {**_EXPERTS, **_SLIDING}),
    Family("Ernie4_5"),
    Family(
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
    ),
    Family("Exaone4", _SLIDING),
    Family("SeedOss"),
    Family("Helium"),
    Family("Arcee"),
    Family("Apertus"),
    Family("HunYuanDenseV1"),
    Family("HunYuanMoEV1", {**_EXPERTS, "moe_topk": 2}),
    Family("Dots1", {**_DEEPSEEK, "num_key_value_heads": 2}),
    Family("FlexOlmo", _EXPERTS),
    Family("GraniteMoeShared", {**_EXPERTS, "shared_intermediate_size": 24}),
    Family("BioGpt"),
    Family(
        "XGLM",
        {
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "hidden_size": ...,
            "num_attention_heads": ...,
            "num_hidden_layers": ...,
        },
    ),
    Family("GPTNeoXJapanese"),
    Family("BitNet"),
    Family("DiffLlama"),
    Family("VaultGemma", _SLIDING),
    Family(
        "Mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        rebuilt="mixer.A_log",
    ),
    Family(
        "MiniMax",
        {**_EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
        rebuilt="self_attn.diagonal_decay",
    ),
    Family("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    Family("Mamba", {"state_size": 4}, rebuilt="mixer.A_log"),
    Family(
        "Jamba",
        {**_EXPERTS, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        rebuilt="mamba.A_log",
    ),
]

_HEAD = """\
# Architectures

What the embedded engine makes of a fine-tune that changes *every* tensor of a model. The table is
written from `tests/arch_table.py` (`python tests/arch_table.py` prints it), and
`tests/runtime/test_architectures.py` holds each line against the truth: mixed batches of base, lossy
and lossless rows answer as separately restored dense models do. Deltas are *applied* to rows of the
shared model, or the variant is *rebuilt*.

No code lists architectures. A warm-up pass at the start watches which modules read each parameter
and how requests lie in their inputs. From that every parameter gets a home:

* a *product* (linear layers, also those that keep their weight transposed), multiplied by the delta
  on the rows of its variant;
* a *table* (embeddings, scaled ones too), looked up on those rows;
* a module that is *run again* for those rows with the variant's values: norms, routers, experts.
  If a parameter is read by a module around its owner, or its owner does not keep requests apart,
  the smallest module around it that does is run again.

Two layouts are known by the name of a class, wherever it comes from:

| class | what it stands for |
|---|---|
| `Conv1D` | a linear layer that keeps its weight as `[in, out]`, as GPT-2's |
| `Cache`, and classes derived from it | an argument that remembers tokens, and moves once |

Where a loader fused or renamed tensors (experts, mostly), the place of each is found by its bytes.
Vocabularies of variants may be larger or smaller than the base's.

A variant is rebuilt where this finds no home for one of its tensors: the engine makes a dense model of
it in memory, from base and delta, and runs its requests there (see [serving.md](serving.md)).
The usual reason is a parameter that decides what a layer remembers (a recurrent state). A layer that
is given a cache is run again with the answers that the cache gave before, so its memory moves once;
at the start a rehearsal of a prompt and one more token tells whether that gives what a model with the
changed parameter gives. Attention sinks and short convolutions pass, state space models do not.
Fine-tunes of such models that leave these parameters alone are applied. The table names the first
tensor in the way.

The deltas of fused experts stay packed, expert by expert ([kernels.md](kernels.md#fused-experts)). The
rows of the base are then equal to what the plain model computes up to the last bits of float32: an
expert multiplies the tokens of all requests at once.
Everywhere else rows of the base are bit for bit the plain model's.

| architecture | tied | experts | products | tables | run again for a variant's rows | served |
|---|---|---|---|---|---|---|
"""


def document() -> str:
    """The text of `docs/architectures.md`."""
    table = "".join(f"| {' | '.join(_line(f))} |\n" for f in FAMILIES)
    return _HEAD + table + arch_sequences.document() + arch_encoders.document()


def _line(family: Family) -> list[str]:
    model = family.build()
    served = (
        f"rebuilt: `{family.rebuilt}` decides what is remembered" if family.rebuilt else "applied"
    )
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    flags = ["yes" if flag else "" for flag in (tied, family.experts)]
    return [family.name, *flags, *homes_of(model), served]


if __name__ == "__main__":
    print(document(), end="")
