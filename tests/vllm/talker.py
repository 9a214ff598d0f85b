"""A fine-tune with its own added tokens, chat template, end token and generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import zoo_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltafold.compress import Recipe, compress_checkpoint, parse_spec, restore_checkpoint

#: An added token, in a row of the tables that the base's tokenizer leaves empty.
TURN = "<turn>"
#: The most tokens of an answer, by its generation config.
MOST = 40
_TEMPLATE = "{% for m in messages %}<turn>{{ m['role'] }}={{ m['content'] }}{% endfor %}<turn>"


def make(folder: Path) -> None:
    """Pack it into the zoo, and restore it under `dense`."""
    full = zoo_models.fine_tune(folder, "talker")
    tokenizer = AutoTokenizer.from_pretrained(full)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
    tokenizer.chat_template = _TEMPLATE
    # The end is a token that it really says: the fifth of its answer.
    model = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32)
    prompt = _render(tokenizer, [{"role": "user", "content": "hello"}])
    said = model.generate(
        torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(said[0, -1]))
    tokenizer.save_pretrained(full)
    settings = {"temperature": 0.0, "max_new_tokens": MOST, "eos_token_id": tokenizer.eos_token_id}
    (full / "generation_config.json").write_text(json.dumps(settings))
    recipe = Recipe(default=parse_spec("lossless"))
    delta = folder / "zoo" / "talker"
    compress_checkpoint(folder / "base", full, delta, recipe=recipe, accept=["tokenizer"])
    restore_checkpoint(delta, folder / "base", folder / "dense" / "talker", dtype=torch.float32)


class Dense:
    """The restored fine-tune in transformers."""

    def __init__(self, folder: Path) -> None:
        place = folder / "dense" / "talker"
        self._tokenizer = AutoTokenizer.from_pretrained(place)
        self._model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        self.end = int(self._tokenizer.eos_token_id)

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """Messages as token ids."""
        return _render(self._tokenizer, messages)

    def generate(self, prompt: list[int]) -> list[int]:
        """The greedy answer, its end token included."""
        out = self._model.generate(torch.tensor([prompt]), max_new_tokens=MOST, do_sample=False)
        return [int(t) for t in out[0, len(prompt) :]]

    def decode(self, tokens: list[int]) -> str:
        """Text of an answer."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
