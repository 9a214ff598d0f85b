"""What `/v1/embeddings` and `/classify` have in common: their inputs, and how they are answered."""

from __future__ import annotations

import base64
import binascii
import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, TypeVar
from urllib.parse import quote

from fastapi import Request
from pydantic import BeforeValidator, Field, model_validator

from deltafold.runtime.engine import VariantInfo
from deltafold.runtime.pooled import Pooled, Pooler, PoolRequest
from deltafold.server.desk import desk_of
from deltafold.server.disconnect import unless_gone
from deltafold.server.errors import ApiError
from deltafold.server.openai import neutral
from deltafold.server.openai.replies import Usage
from deltafold.server.openai.schemas import Body, TokenId, check_prompts
from deltafold.server.openai.selector import find

#: Most texts or pictures of one request, as in the OpenAI API.
MAX_INPUTS: Final = 2048
#: Most pixels of a picture; more are not decoded.
MAX_PIXELS: Final = 2**26

_DATA_URL: Final = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)

Answer = TypeVar("Answer", bound=Pooled)


class PoolBody(Body):
    """What both bodies understand. Pictures are `data:image/...;base64,` URLs among the texts."""

    neutral_fields = neutral.POOL
    model: str = Field(min_length=1, description="`sql`, `sql@3f2a`, `base` or `org/base:sql`")
    input: Annotated[
        str | list[str] | list[TokenId] | list[list[TokenId]], BeforeValidator(check_prompts)
    ]

    @model_validator(mode="after")
    def _not_too_many(self) -> PoolBody:
        if len(self.inputs()) > MAX_INPUTS:
            raise ValueError(f"input may hold {MAX_INPUTS} texts or pictures at most")
        return self

    def inputs(self) -> list[Any]:
        """Texts and lists of token ids, whichever way they were written."""
        if isinstance(self.input, str):
            return [self.input]
        tokens = [one for one in self.input if isinstance(one, int)]
        return [tokens] if tokens else list(self.input)


@dataclass(frozen=True)
class Reply(Generic[Answer]):
    """Answers of one variant to all inputs of a body."""

    info: VariantInfo
    name: str
    answers: list[Answer]

    @property
    def usage(self) -> Usage:
        """Token counts; pictures count none."""
        tokens = sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}

    @property
    def headers(self) -> dict[str, str]:
        """Which variant answered."""
        return {
            "x-deltafold-variant": quote(self.name, safe="/:@+ "),
            "x-deltafold-digest": self.info.digest,
        }


async def ask(
    request: Request,
    body: PoolBody,
    work: Callable[[Pooler, Sequence[PoolRequest]], list[Answer]],
) -> Reply[Answer]:
    """Have the engine answer all inputs of a body."""
    desk, arrived = desk_of(request), time.perf_counter()
    engine = desk.pooler

    def run() -> Reply[Answer]:
        selector, info = find(engine, body.model, desk.served_model_name)
        inputs = [_picture_or(one, i, engine) for i, one in enumerate(body.inputs())]
        answers = work(engine, [PoolRequest(info.name, one) for one in inputs])
        # The zoo may have changed since the name was resolved.
        selector.check(info.name, answers[0].digest)
        return Reply(info, desk.shown_name(info), answers)

    reply = await unless_gone(request, desk.call(run))
    seconds = time.perf_counter() - arrived
    desk.metrics.count_pooled(reply.name, [a.tokens for a in reply.answers], seconds)
    return reply


def _picture_or(value: Any, index: int, engine: Pooler) -> Any:
    """A picture where the text is one and the model reads pictures; else the text itself.

    Models that read nothing else take plain base64 too.
    """
    if not isinstance(value, str) or not engine.pictures:
        return value
    match = _DATA_URL.match(value)
    if match is None and engine.max_model_len:
        return value
    return _decoded(value[match.end() :] if match else value, index)


def _decoded(text: str, index: int) -> Any:
    from deltafold.runtime.embedded.images import need_pillow

    need_pillow()
    import PIL.Image

    try:
        data = base64.b64decode(text, validate=True)
        with PIL.Image.open(io.BytesIO(data)) as file:
            if file.width * file.height > MAX_PIXELS:
                raise _no_picture(index, f"more than {MAX_PIXELS} pixels")
            return file.convert("RGB")
    except (binascii.Error, OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise _no_picture(index, str(error)) from error


def _no_picture(index: int, why: str) -> ApiError:
    return ApiError(
        400,
        f"input[{index}] is no picture: {why}; send data:image/png;base64,...",
        code="invalid_image",
        param=f"input[{index}]",
    )
