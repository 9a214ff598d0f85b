"""vLLM's request handlers, led through the own text of the variant that a request names.

A handler of vLLM's server is an object that holds what it renders with: renderer, template, defaults.
For a variant with a text of its own the handler's method runs on a shallow copy that holds the
variant's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, Final

from deltafold.runtime.vllm.texts import RENDERED_BY, OwnText
from deltafold.server.vllm.front import RefusedError

_NOT_FOUND: Final = 404
#: Module, class and methods of the handlers whose requests name a model.
_HANDLERS: Final = (
    ("openai.chat_completion.serving", "OpenAIServingChat", "create_chat_completion"),
    (
        "openai.chat_completion.batch_serving",
        "OpenAIServingChatBatch",
        "create_batch_chat_completion",
    ),
    ("openai.completion.serving", "OpenAIServingCompletion", "create_completion"),
    ("openai.responses.serving", "OpenAIServingResponses", "create_responses"),
    ("anthropic.serving", "AnthropicServingMessages", "create_messages"),
    ("serve.tokenize.serving", "ServingTokenization", "create_tokenize"),
    ("serve.tokenize.serving", "ServingTokenization", "create_detokenize"),
)


def install(front_of: Callable[[Any], Any]) -> None:
    """Wrap the handlers' methods.

    Args:
        front_of: the front of a handler's table of models, or None.
    """
    for module, name, method in _HANDLERS:
        kind = getattr(import_module(f"vllm.entrypoints.{module}"), name)
        setattr(kind, method, _speaking(getattr(kind, method), front_of))


def _speaking(stock: Any, front_of: Callable[[Any], Any]) -> Any:
    @wraps(stock)
    async def handle(self: Any, request: Any, *args: Any, **named: Any) -> Any:
        try:
            own = await _own_text(self, request.model, request, front_of)
        except _AnsweredError as error:
            return error.answer
        return await stock(self if own is None else _with(self, own), request, *args, **named)

    return handle


async def _own_text(
    handler: Any, name: str | None, request: Any, front_of: Callable[[Any], Any]
) -> OwnText | None:
    """The text of the variant that a request names, which is loaded for it if need be; raises
    `_AnsweredError` where it cannot be.
    """
    models = handler.models
    front = front_of(models) if hasattr(models, "lora_requests") else None
    if front is None or not name or models.is_base_model(name):
        return None
    if name not in models.lora_requests:
        refused = await handler._check_model(request)
        if refused is not None:
            if refused.error.code == _NOT_FOUND:
                refused.error.message += await front.near(name)
            raise _AnsweredError(refused)
    lora = models.lora_requests.get(name)
    if lora is None:
        return None
    try:
        await front.ensure(lora)
    except RefusedError as error:
        raise _AnsweredError(error_of(error)) from error
    own: OwnText | None = await front.text_of(lora)
    return own


class _AnsweredError(Exception):
    """What a client gets instead of an answer."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self.answer = answer


def error_of(error: Exception | str) -> Any:
    """vLLM's error object. 400 whatever the reason: its front passes no other on to clients."""
    from vllm.entrypoints.serve import create_error_response

    return create_error_response(str(error))


def _with(handler: Any, own: OwnText) -> Any:
    mine = copy.copy(handler)
    mine.renderer = own.renderer
    mine.online_renderer = copy.copy(handler.online_renderer)
    mine.online_renderer.renderer = own.renderer
    if own.templates and hasattr(handler, "chat_template"):
        # What the server was started with is for the base; none is the tokenizer's own.
        mine.chat_template = mine.online_renderer.chat_template = None
    if hasattr(handler, "default_sampling_params"):
        mine.default_sampling_params = own.sampling
    if hasattr(handler, "engine_client"):
        mine.engine_client = _Marking(handler.engine_client, own.key)
    return mine


class _Marking:
    """An engine client that tells whose tokenizer its prompts were rendered with."""

    def __init__(self, inner: Any, key: str) -> None:
        self._inner, self._key = inner, key

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(self, prompt: Any, *args: Any, **named: Any) -> Any:
        """As the engine's, with the prompt marked."""
        if isinstance(prompt, dict):
            prompt = {**prompt, RENDERED_BY: self._key}
        return self._inner.generate(prompt, *args, **named)
