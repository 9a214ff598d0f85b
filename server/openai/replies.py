"""The shapes of replies, as OpenAPI shows them. Plain dicts at run time: they are ours to make."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal, NotRequired
from urllib.parse import quote

from typing_extensions import TypedDict

from deltafold.runtime.engine import FinishReason
from deltafold.server.generation import Generation


class Usage(TypedDict):
    """Token counts of one HTTP request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(TypedDict):
    """A likely token. `bytes` is null where the text is only part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    """A generated token and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a chat choice."""

    content: list[TokenLogprobs]
    refusal: None


class CompletionLogprobs(TypedDict):
    """Log-probabilities of a completion choice: lists of equal length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ReplyMessage(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class Delta(TypedDict, total=False):
    """What a chunk adds to the message."""

    role: Literal["assistant"]
    content: str


class ChunkChoice(TypedDict):
    """One choice's part of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(TypedDict):
    """One completion, or a streamed piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Head(TypedDict):
    """What all replies to one request share."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Head):
    """Reply of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Completion(Head):
    """Reply of `/v1/completions`, and each event of its stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class DeltaFacts(TypedDict):
    """What `/v1/models` says of a variant besides OpenAI's fields."""

    digest: str
    codec: str
    delta_bytes: int
    ratio: float | None
    tier: str
    coverage: float
    quality: dict[str, Any]
    applied: str | None
    obstacle: str | None


class ModelCard(TypedDict):
    """One served model; `parent` is null for the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    deltafold: DeltaFacts


class ModelList(TypedDict):
    """Reply of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(TypedDict):
    """Reply of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(TypedDict):
    """Reply of `/detokenize`."""

    prompt: str


def head(generation: Generation, prefix: str) -> Head:
    """A new reply's id, time, model and fingerprint."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": generation.desk.shown_name(generation.info),
        "system_fingerprint": generation.fingerprint,
    }


def usage(generation: Generation) -> Usage:
    """The token counts so far."""
    prompt, generated = generation.prompt_tokens, generation.generated_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


def headers(generation: Generation) -> dict[str, str]:
    """Which variant answered, for logs and gateways that do not read bodies."""
    return {
        "x-deltafold-variant": quote(generation.desk.shown_name(generation.info), safe="/:@+ "),
        "x-deltafold-digest": generation.info.digest,
    }
