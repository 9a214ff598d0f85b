"""From a prompt to what a whole batch needs of a request: inputs, settings, and room to write."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final

import torch
from transformers import GenerationConfig

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.batches import Writing, generation_config
from deltafold.runtime.embedded.checks import output_limit
from deltafold.runtime.embedded.inputs import Brought, Processors, bring
from deltafold.runtime.embedded.runner import stated_context
from deltafold.runtime.embedded.text import TextFront
from deltafold.runtime.engine import Prompt
from deltafold.runtime.host import Variant

#: Used where a configuration does not say how much a model can write.
_UNSTATED: Final = 2048
_WRITES: Final = ("max_target_positions", "max_position_embeddings", "n_positions", "seq_length")
_READS: Final = ("max_source_positions", "max_position_embeddings")


def output_context(model: Any) -> int:
    """Most tokens that a model with an encoder can write."""
    return stated_context(model.config.get_text_config(decoder=True), _WRITES) or _UNSTATED


class Drafts:
    """Makes `Writing`s. Thread-safe."""

    def __init__(self, model: Any, base_folder: Path) -> None:
        """The shared model and its folder."""
        self._model, self._base_folder = model, base_folder
        self._processors = Processors(base_folder)
        self._lock = threading.Lock()
        self._configs: dict[str, GenerationConfig] = {}

    def make(self, prompt: Prompt, front: TextFront, variant: Variant | None) -> Writing:
        """Read a prompt by the variant's own tokenizer and processor.

        Raises:
            DeltafoldError: `bad-argument` for a prompt that the model or its processor does not take.
        """
        digest, folder = ("", self._base_folder)
        if variant is not None:
            digest, folder = variant.digest, variant.folder
        brought = bring(prompt, front, lambda: self._processors.get(digest, front.name, folder))
        if "input_features" in brought.tensors and "decoder_input_ids" not in brought.tensors:
            brought = _opened(brought, front.opening)
        own = None if variant is None else variant.model
        return Writing(brought, self._config(digest, folder, own), own)

    def limit(self, writing: Writing, max_tokens: int | None, room: int) -> int:
        """Most tokens to write. Raises `context-length`.

        Args:
            writing: of the request.
            max_tokens: as in `Sampling`.
            room: most tokens of one output, or of prompt and output where these are one text.
        """
        model = self._model if writing.model is None else writing.model
        read = len(writing.brought.ids)
        if not model.config.is_encoder_decoder:
            return output_limit(read, max_tokens, room)
        most = stated_context(model.config, _READS)
        if most is not None and read > most:
            raise DeltafoldError(
                "context-length",
                "the prompt does not fit into the encoder.",
                facts=[("prompt tokens", read), ("encoder", most)],
                fix="shorten the prompt",
            )
        given = writing.brought.tensors.get("decoder_input_ids")
        return output_limit(1 if given is None else given.shape[1], max_tokens, room)

    def _config(self, digest: str, folder: Path, own: Any | None) -> GenerationConfig:
        with self._lock:
            if digest not in self._configs:
                model = self._model if own is None else own
                self._configs[digest] = generation_config(model, folder)
            return self._configs[digest]


def _opened(brought: Brought, opening: tuple[int, ...]) -> Brought:
    """A transcript that begins as the variant's tokenizer says."""
    if not opening:
        return brought
    tensors = {**brought.tensors, "decoder_input_ids": torch.tensor([opening])}
    return Brought(tensors, brought.ids)
