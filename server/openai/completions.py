"""`POST /v1/completions`: raw text in, raw text out, and what evaluation harnesses need of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltafold.runtime.engine import Chunk, FinishReason, TokenLogprob
from deltafold.server.generation import Generation, Result
from deltafold.server.openai.answer import ERRORS, answer
from deltafold.server.openai.logprobs import completion_logprobs
from deltafold.server.openai.replies import Completion, CompletionLogprobs, head
from deltafold.server.openai.schemas import CompletionRequest

router = APIRouter(prefix="/v1", tags=["generate"])


@router.post("/completions", response_model=Completion, responses=ERRORS)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one or more prompts with the variant that `model` names."""
    shape = functools.partial(CompletionShape, echo=bool(body.echo))
    return await answer(request, body, body.jobs(), shape)


class CompletionShape:
    """The replies of a completion.

    With `echo` a choice begins with its prompt: the text as it was sent, or the tokens decoded by
    the variant's tokenizer.
    """

    def __init__(self, generation: Generation, *, echo: bool) -> None:
        self._generation = generation
        self._head = head(generation, "cmpl")
        self._echo = echo
        self._logprobs = generation.jobs[0].sampling.logprobs is not None
        self._prompts = [""] * len(generation.jobs)
        self._first_tokens = [""] * len(generation.jobs)
        #: How long each choice's text is so far.
        self._written = [0] * len(generation.jobs)

    async def prepare(self) -> None:
        """Get the prompts' texts."""
        if self._echo:
            await self._generation.desk.call(self._decode_prompts)

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """A `text_completion`, its usage left out."""
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        return self._reply(*choices)

    def opening(self, index: int) -> dict[str, Any] | None:
        """The echoed prompt."""
        if not self._echo:
            return None
        text, logprobs = self._prompts[index], self._prompt_logprobs(index)
        self._written[index] = len(text)
        return self._reply(_part(index, text, logprobs))

    def piece(self, index: int, chunk: Chunk) -> dict[str, Any] | None:
        """What a chunk adds."""
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return None
        logprobs = self._spelled(chunk.logprobs, self._written[index])
        self._written[index] += sum(len(token.text) for token in chunk.logprobs)
        return self._reply(_part(index, chunk.text, logprobs, chunk.finish_reason))

    def closing(self) -> dict[str, Any]:
        """An event without choices."""
        return self._reply()

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        echoed = self._prompts[index]
        logprobs = self._spelled(result.logprobs, len(echoed))
        if logprobs and self._echo:
            logprobs = _joined(self._prompt_logprobs(index), logprobs)
        return _part(index, echoed + result.text, logprobs, result.finish_reason)

    def _reply(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": "text_completion", "choices": list(choices)}

    def _spelled(self, tokens: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs | None:
        return completion_logprobs(tokens, offset) if self._logprobs else None

    def _prompt_logprobs(self, index: int) -> CompletionLogprobs | None:
        if not self._logprobs:
            return None
        tokens = self._generation.tickets[index].prompt_logprobs
        return completion_logprobs(tokens, 0, first_text=self._first_tokens[index])

    def _decode_prompts(self) -> None:
        engine, name = self._generation.engine, self._generation.info.name
        pairs = zip(self._generation.jobs, self._generation.tickets, strict=True)
        for index, (job, ticket) in enumerate(pairs):
            sent = job.prompt
            text = sent if isinstance(sent, str) else engine.decode(name, ticket.prompt_ids)
            self._prompts[index] = text
            self._first_tokens[index] = engine.decode(name, ticket.prompt_ids[:1])


def _part(
    index: int,
    text: str,
    logprobs: CompletionLogprobs | None = None,
    finish_reason: FinishReason | None = None,
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _joined(
    first: CompletionLogprobs | None, second: CompletionLogprobs
) -> CompletionLogprobs | None:
    if first is None:
        return second
    return {
        "tokens": first["tokens"] + second["tokens"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
        "text_offset": first["text_offset"] + second["text_offset"],
    }
