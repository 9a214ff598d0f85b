"""Request bodies. Unknown fields are refused; `neutral` lists the ones that may be sent idly."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from deltafold.runtime.engine import Message, Prompt, Sampling
from deltafold.server.generation import Job
from deltafold.server.openai import neutral
from deltafold.server.openai.embeds import read_prompt_embeds

#: Most choices (prompts times `n`) of one HTTP request.
MAX_CHOICES: Final = 1024

#: Most stop texts of one request.
MAX_STOPS: Final = 16

_SEED_LIMIT: Final = 2**63

TokenId = Annotated[int, Field(ge=0, strict=True)]


class Body(BaseModel):
    """A request body that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    neutral_fields: ClassVar[Mapping[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: Any) -> Any:
        return neutral.drop_neutral(body, cls.neutral_fields)


class StreamOptions(Body):
    """Options of a streamed reply."""

    neutral_fields = neutral.STREAM
    include_usage: bool | None = None


_HALF_PAIR: Final = re.compile("[\ud800-\udfff]")


def _is_text(value: Any) -> bool:
    """JSON can spell half a surrogate pair; no tokenizer takes one."""
    return isinstance(value, str) and not _HALF_PAIR.search(value)


def _proper(text: str) -> str:
    if not _is_text(text):
        raise ValueError("the text has half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_proper)]


def _check_stop(value: Any) -> Any:
    stops = [] if value is None else value if isinstance(value, list) else [value]
    if len(stops) > MAX_STOPS or not all(_is_text(stop) and stop for stop in stops):
        raise ValueError(
            f"expected a text or a list of up to {MAX_STOPS} texts, none of them empty"
        )
    return value


class Generate(Body):
    """What both generating routes understand. Null means the default."""

    model: str = Field(min_length=1, description="`sql`, `sql@3f2a`, `base` or `org/base:sql`")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-_SEED_LIMIT, lt=_SEED_LIMIT)
    stop: Annotated[str | list[str] | None, BeforeValidator(_check_stop)] = None
    temperature: float | None = Field(None, ge=0, description="default 1, as in the OpenAI API")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 keep all tokens")
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    delta_scale: float | None = Field(
        None, description="multiplies the delta: 1 is the fine-tune, 0 the base, 1.5 extrapolates"
    )

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Generate:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for requests with stream=true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(self, max_tokens: int | None, logprobs: int | None, echo: bool) -> Sampling:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            stop=tuple(stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            echo=echo,
            scale=1.0 if self.delta_scale is None else self.delta_scale,
        )

    def _jobs(self, prompts: list[Prompt], sampling: Sampling) -> list[Job]:
        """`n` jobs for each prompt, in the order of the reply's choices."""
        return [
            Job(prompt, _reseeded(sampling, i), source)
            for source, prompt in enumerate(prompts)
            for i in range(self.n or 1)
        ]


def _reseeded(sampling: Sampling, step: int) -> Sampling:
    """The same request with the next seed: choices of one prompt must differ, and repeat."""
    if sampling.seed is None or step == 0:
        return sampling
    seed = (sampling.seed + step + _SEED_LIMIT) % (2 * _SEED_LIMIT) - _SEED_LIMIT
    return dataclasses.replace(sampling, seed=seed)


class TextPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


def _join_parts(content: Any) -> Any:
    """Chat templates want one text: parts are joined by newlines, as in vLLM."""
    if content is None or _is_text(content):
        return content
    if not isinstance(content, list):
        raise ValueError("expected a text or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"content part of type {kind!r} is not supported; send text")
    return "\n".join(TextPart.model_validate(part).text for part in content)


class ChatMessage(Body):
    """One message of a conversation."""

    neutral_fields = neutral.MESSAGE
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart] | None, BeforeValidator(_join_parts)] = None
    name: Text | None = None

    def rendered(self) -> Message:
        """As chat templates know it: they have no `developer`, the newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content or ""}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(Generate):
    """Body of `POST /v1/chat/completions`."""

    neutral_fields = neutral.CHAT
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for requests with logprobs=true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self

    def jobs(self) -> list[Job]:
        """What to generate."""
        limit = self.max_completion_tokens or self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        messages = [message.rendered() for message in self.messages]
        return self._jobs([messages], self._sampling(limit, logprobs, echo=False))


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_prompt(value: Any) -> bool:
    """Whether a value is a text or a list of token ids, not empty."""
    return _is_text(value) or (
        isinstance(value, list) and bool(value) and all(map(_is_token, value))
    )


def check_prompts(value: Any) -> Any:
    """A text, tokens, or a list of one of the two. Raises `ValueError`: one for the whole union."""
    many = isinstance(value, list) and bool(value) and all(map(is_prompt, value))
    if not is_prompt(value) and not (many and len({type(one) for one in value}) == 1):
        raise ValueError(
            "expected a text, a list of texts, a list of token ids, or a list of such lists;"
            " none of the lists empty"
        )
    return value


def _check_prompt(value: Any, info: ValidationInfo) -> Any:
    """One clear error instead of one for each member of the union."""
    if info.data.get("prompt_embeds") is not None:
        if value is not None:
            raise ValueError("send prompt or prompt_embeds, not both")
        return None
    return check_prompts(value)


class CompletionRequest(Generate):
    """Body of `POST /v1/completions`."""

    neutral_fields = neutral.COMPLETION
    # Before the prompt, whose check looks at it.
    prompt_embeds: Annotated[
        list[Any] | None,
        BeforeValidator(read_prompt_embeds),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]}),
    ] = Field(
        None, description="instead of a prompt: base64 of a .npy or safetensors file, or a list"
    )
    prompt: Annotated[
        str | list[str] | list[TokenId] | list[list[TokenId]] | None,
        BeforeValidator(_check_prompt),
    ] = Field(None, validate_default=True)
    max_tokens: int | None = Field(None, ge=0, description="default 16; 0 only with echo")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 makes sense only with echo=true")
        if self.echo and self.prompt_embeds is not None:
            raise ValueError("embeddings have no tokens to echo")
        if len(self.prompts()) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"prompts times n may be {MAX_CHOICES} at most")
        return self

    def prompts(self) -> list[Prompt]:
        """The prompts, whichever way they were written."""
        if self.prompt_embeds is not None:
            return list(self.prompt_embeds)
        assert self.prompt is not None
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [one for one in self.prompt if isinstance(one, int)]
        return [tokens] if tokens else [one for one in self.prompt if not isinstance(one, int)]

    def jobs(self) -> list[Job]:
        """What to generate."""
        limit = 16 if self.max_tokens is None else self.max_tokens
        # Without log-probabilities the server echoes by itself, and the engine has less to do.
        echo = bool(self.echo) and self.logprobs is not None
        return self._jobs(self.prompts(), self._sampling(limit, self.logprobs, echo))


class TokenizeRequest(Body):
    """Body of `POST /tokenize`: a prompt or messages."""

    neutral_fields = neutral.TOKENIZE
    model: str = Field(min_length=1)
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self

    def source(self) -> Prompt:
        """What to tokenize."""
        if self.messages is not None:
            return [message.rendered() for message in self.messages]
        assert self.prompt is not None
        return self.prompt


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`."""

    model: str = Field(min_length=1)
    tokens: list[TokenId]
