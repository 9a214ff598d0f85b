"""Each variant's own way from text to token ids and back, in the process that talks to vLLM's engine.

vLLM has one tokenizer, one chat template and one generation config an engine. A fine-tune may bring its
own: added tokens in rows that the base leaves empty, another template, other end tokens, other defaults
of sampling. Where its files differ from the base's it gets a renderer of its own here, and its requests
are prepared and their tokens turned into text with that. Most fine-tunes bring copies of the base's
files: for them nothing is made.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.text import content_key, has_tokenizer, template_key
from deltafold.runtime.vllm.source import untagged

#: Set in an engine input by whoever rendered it with a variant's own tokenizer: the variant's key.
RENDERED_BY: Final = "deltafold_rendered_by"
_TEXTS: Final = "_deltafold_texts"
#: Of a generation config, what says nothing about generating.
_ABOUT: Final = ("transformers_version", "_from_model_config")


@dataclass(frozen=True, eq=False)
class OwnText:
    """What one variant does not share with the base.

    Attributes:
        key: of the variant: its digest, or its path where it was given without (`vllm.LLM`).
        renderer: vLLM's renderer over the variant's tokenizer, or over the base's.
        generation: the variant's generation config, as vLLM reads it.
        sampling: what requests get where they say nothing.
        tokenizes: whether text becomes other token ids than with the base's tokenizer.
        templates: whether messages become another text.
        speaks_otherwise: whether token ids stand for other text, or another one ends an answer.
    """

    key: str
    renderer: Any
    generation: dict[str, Any]
    sampling: dict[str, Any]
    tokenizes: bool
    templates: bool
    speaks_otherwise: bool


class Texts:
    """Own texts by the variants' keys. Thread-safe.

    Args:
        vllm_config: of the engine.
        base: folder of the base.
        renderer: the engine's.
    """

    def __init__(self, vllm_config: Any, base: Path, renderer: Any) -> None:
        self._config, self._base, self._renderer = vllm_config, base, renderer
        self._generation = _generation(vllm_config.model_config)
        self._own: dict[str, OwnText | None] = {}
        self._renderers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def read(self, key: str, folder: Path) -> OwnText | None:
        """Make what a variant does not share with the base; None where that is nothing. Reads files.

        Args:
            key: of the variant.
            folder: with its tokenizer and configs.

        Raises:
            DeltafoldError: `engine-unsupported` for a tokenizer of its own beside a base that takes
                pictures or sounds, whose processor belongs to the base's tokenizer.
        """
        with self._lock:
            if key not in self._own:
                self._own[key] = self._make(key, folder)
            return self._own[key]

    def of(self, lora_request: Any) -> OwnText | None:
        """The own text of a request's variant, which `read` has seen."""
        if lora_request is None:
            return None
        key = _key(lora_request.lora_path)
        with self._lock:
            return self._own.get(key)

    def forget(self, lora_path: str) -> None:
        """Drop a variant's text, and its tokenizer unless another variant has it too."""
        with self._lock:
            self._own.pop(_key(lora_path), None)
            used = {id(own.renderer) for own in self._own.values() if own is not None}
            self._renderers = {k: r for k, r in self._renderers.items() if id(r) in used}

    def _make(self, key: str, folder: Path) -> OwnText | None:
        config = self._config.model_config
        mine = copy.copy(config)
        tokenizes = has_tokenizer(folder) and content_key(folder) != content_key(self._base)
        own_template = template_key(folder)
        templates = has_tokenizer(folder) and own_template != template_key(self._base)
        if _has_configs(folder):
            mine.model, mine.hf_config_path, mine.revision = str(folder), None, None
        generation = _generation(mine)
        if not (tokenizes or templates) and generation == self._generation:
            return None
        renderer = self._renderer
        if (tokenizes or templates) and not config.skip_tokenizer_init:
            mine.tokenizer, mine.tokenizer_revision = str(folder), None
            renderer = self._render(mine, content_key(folder) + own_template)
        sampling = mine.get_diff_sampling_param()
        otherwise = renderer is not self._renderer and _differ(renderer, self._renderer)
        return OwnText(key, renderer, generation, sampling, tokenizes, templates, otherwise)

    def _render(self, config: Any, key: str) -> Any:
        """vLLM's renderer over a tokenizer of its own; variants with equal files share one."""
        if config.supports_multimodal_inputs:
            raise DeltafoldError(
                "engine-unsupported",
                f"{config.tokenizer}: it has a tokenizer or chat template of its own, and the base "
                "takes more than text.",
                fix="restore this variant and serve it by itself, or use the embedded engine",
            )
        if key not in self._renderers:
            from vllm.renderers.registry import RENDERER_REGISTRY
            from vllm.tokenizers.registry import get_tokenizer, tokenizer_args_from_config

            mode, *_ = tokenizer_args_from_config(config)
            tokenizer = get_tokenizer(  # not vLLM's cached one: a folder may be replaced
                config.tokenizer,
                runner_type=config.runner_type,
                tokenizer_mode=config.tokenizer_mode,
                trust_remote_code=config.trust_remote_code,
            )
            whole = copy.copy(self._config)
            whole.model_config = config
            self._renderers[key] = RENDERER_REGISTRY.load_renderer(mode, whole, tokenizer)
        return self._renderers[key]


def _differ(one: Any, other: Any) -> bool:
    mine, base = one.tokenizer, other.tokenizer
    return bool(mine.get_vocab() != base.get_vocab() or mine.eos_token_id != base.eos_token_id)


def _key(lora_path: str) -> str:
    return untagged(lora_path)[1] or lora_path


def _has_configs(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("generation_config.json", "config.json"))


def _generation(model_config: Any) -> dict[str, Any]:
    found: dict[str, Any] = model_config.try_get_generation_config()
    return {name: value for name, value in found.items() if name not in _ABOUT}


def texts_of(engine: Any, base: Path) -> Texts:
    """The texts of an `AsyncLLM` or `LLMEngine`, through which all its requests go from now on."""
    texts: Texts | None = engine.__dict__.get(_TEXTS)
    if texts is None:
        texts = Texts(engine.vllm_config, base, engine.renderer)
        setattr(engine, _TEXTS, texts)
        _attach(texts, engine)
    return texts


def _attach(texts: Texts, engine: Any) -> None:
    from vllm.utils.async_utils import make_async

    reader, writer = engine.input_processor, engine.output_processor
    prepare, begin = reader.process_inputs, writer.add_request
    spoken: dict[str, Any] = {}

    def process_inputs(request_id: str, prompt: Any, params: Any, *args: Any, **named: Any) -> Any:
        # `supported_tasks, arrival_time, lora_request` follow; vLLM names them.
        own = texts.of(named.get("lora_request"))
        if own is None:
            return prepare(request_id, prompt, params, *args, **named)
        _check(own, prompt, params, texts._config.model_config.get_vocab_size())
        if own.key not in spoken or spoken[own.key].renderer is not own.renderer:
            mine = copy.copy(reader)
            mine.__dict__.pop("process_inputs", None)
            mine.renderer, mine.generation_config_fields = own.renderer, own.generation
            spoken[own.key] = mine
        return spoken[own.key].process_inputs(request_id, prompt, params, *args, **named)

    def add_request(request: Any, *args: Any, **named: Any) -> Any:
        own = texts.of(request.lora_request)
        kept = writer.tokenizer
        if own is not None and kept is not None:
            writer.tokenizer = own.renderer.tokenizer
        try:
            return begin(request, *args, **named)
        finally:
            writer.tokenizer = kept

    reader.process_inputs, writer.add_request = process_inputs, add_request
    if hasattr(reader, "process_inputs_async"):
        executor = reader.renderer._executor
        reader.process_inputs_async = make_async(process_inputs, executor=executor)


def _check(own: OwnText, prompt: Any, params: Any, vocabulary: int) -> None:
    """Refuse what would be read or written with the base's tokenizer, or end the engine."""
    from vllm.exceptions import VLLMValidationError

    rendered = isinstance(prompt, dict) and "type" in prompt
    foreign = rendered and prompt.get(RENDERED_BY) != own.key
    if foreign and own.tokenizes and prompt.get("prompt") is not None:
        raise VLLMValidationError(
            "this variant has a tokenizer of its own, and the prompt was tokenised with the base's: "
            "tokenise it with the variant's and give token ids"
        )
    if own.speaks_otherwise and getattr(params, "structured_outputs", None) is not None:
        raise VLLMValidationError(
            "this variant has another vocabulary or end token than the base, by which vLLM holds "
            "answers to a grammar: leave structured outputs, JSON mode and forced tools out"
        )
    ids: Sequence[int] = (prompt.get("prompt_token_ids") or ()) if rendered else ()
    if ids and max(ids) >= vocabulary:
        raise VLLMValidationError(f"Token id {max(ids)} is out of vocabulary")
