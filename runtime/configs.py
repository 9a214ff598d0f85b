"""Whether a fine-tune's configuration asks for another computation than its base's.

A delta changes tensors. A fine-tune may also have another rope base, window or scale, and then the
shared model computes something else with the very same tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

#: Keys that record where a model comes from, how it is trained, or what its tokenizer does. Sizes of
#: vocabularies and ties are seen in the tensors themselves.
_INERT: Final = re.compile(
    r"transformers_version|_name_or_path|name_or_path|architectures|auto_map|dtype|torch_dtype"
    r"|_attn_implementation.*|attn_implementation|use_cache|.*token_id|.*token_ids|.*token_index"
    r"|vocab_size|tie_word_embeddings|tokenizer_class|quantization_config|is_encoder_decoder"
    r"|.*initializer.*|.*dropout.*|.*drop_rate|.*pdrop|.*drop_prob|layerdrop|.*_layerdrop"
    r"|.*aux_loss.*|output_.*|return_dict|gradient_checkpointing|pretraining_tp|z_loss.*"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    r"|prefix|chunk_size_feed_forward|max_length|max_new_tokens|num_beams|length_penalty"
)
#: What models read the stated context length for: a rope that is scaled by it.
_CONTEXT: Final = ("max_position_embeddings", "seq_length", "n_positions", "n_ctx", "max_seq_len")
_WINDOW: Final = ("use_sliding_window", "sliding_window", "max_window_layers")


def differing_keys(base: Path, folder: Path) -> list[str]:
    """Keys of a fine-tune's `config.json` by which its model computes otherwise than its base's.

    Args:
        base: folder with the base's `config.json`; one that transformers does not know tells nothing.
        folder: with the fine-tune's; without one it has its base's.

    Returns:
        Sorted keys, nested ones with dots; `model_type` alone where it is another kind of model.
    """
    if not (folder / "config.json").is_file():
        return []
    ours, theirs = _read(base), _read(folder)
    if ours is None:
        return []
    if type(ours) is not type(theirs):
        return ["model_type"]
    mine, other = _plain(ours), _plain(theirs)
    try:
        known = _plain(type(ours)())
    except (ValueError, TypeError):  # made of others, and empty without them
        known = {**mine, **other}
    return sorted(_differences(mine, other, known))


def _read(folder: Path) -> Any:
    """A configuration; None where transformers cannot read it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _plain(config: Any) -> dict[str, Any]:
    """As in a file, where a tuple is a list."""
    found: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return found


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], known: Mapping[str, Any]
) -> Iterator[str]:
    passed = set(_WINDOW) if not (_windows(ours) or _windows(theirs)) else {"max_window_layers"}
    if not (_scaled(ours) or _scaled(theirs)):
        passed |= set(_CONTEXT)
    for key in {*ours, *theirs} - passed:
        mine, other = ours.get(key), theirs.get(key)
        # Keys that the configuration's class does not know are left by somebody's training.
        if key not in known or _INERT.fullmatch(key) or mine == other:
            continue
        if _is_config(mine) and _is_config(other):
            nested = known[key] if isinstance(known[key], Mapping) else {**mine, **other}
            yield from (f"{key}.{k}" for k in _differences(mine, other, nested))
        else:
            yield key


def _is_config(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and "model_type" in value


def _windows(config: Mapping[str, Any]) -> bool:
    """Whether some layers look at a window of their past alone."""
    return bool(config.get("sliding_window")) and config.get("use_sliding_window", True) is True


def _scaled(config: Mapping[str, Any]) -> bool:
    """Whether the rope is another than the plain one."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = re.findall(r"'(?:rope_)?type': '(\w+)'", str(rope))
    return any(kind != "default" for kind in kinds)
