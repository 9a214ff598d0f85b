"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltafold.runtime.engine import Chunk, FinishReason, TokenLogprob
from deltafold.server.generation import Generation, Result
from deltafold.server.openai.answer import ERRORS, answer
from deltafold.server.openai.logprobs import chat_logprobs
from deltafold.server.openai.replies import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    head,
)
from deltafold.server.openai.schemas import ChatRequest

router = APIRouter(prefix="/v1", tags=["generate"])


@router.post("/chat/completions", response_model=ChatCompletion, responses=ERRORS)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Continue a conversation with the variant that `model` names."""
    return await answer(request, body, body.jobs(), ChatShape)


class ChatShape:
    """The replies of a chat."""

    def __init__(self, generation: Generation) -> None:
        self._head = head(generation, "chatcmpl")
        self._logprobs = generation.jobs[0].sampling.logprobs is not None

    async def prepare(self) -> None:
        """Nothing to get."""

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """A `chat.completion`, its usage left out."""
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        return {**self._head, "object": "chat.completion", "choices": choices}

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks."""
        return self._chunk(_part(index, {"role": "assistant", "content": ""}))

    def piece(self, index: int, chunk: Chunk) -> dict[str, Any] | None:
        """What a chunk adds."""
        logprobs = self._spelled(chunk.logprobs) if chunk.logprobs else None
        if not chunk.text and not logprobs and chunk.finish_reason is None:
            return None
        delta: Delta = {"content": chunk.text} if chunk.text or logprobs else {}
        return self._chunk(_part(index, delta, logprobs, chunk.finish_reason))

    def closing(self) -> dict[str, Any]:
        """A chunk without choices."""
        return self._chunk()

    def _choice(self, index: int, result: Result) -> ChatChoice:
        return {
            "index": index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": self._spelled(result.logprobs),
            "finish_reason": result.finish_reason,
        }

    def _chunk(self, *choices: ChunkChoice) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": list(choices)}

    def _spelled(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(tokens) if self._logprobs else None


def _part(
    index: int,
    delta: Delta,
    logprobs: ChatLogprobs | None = None,
    finish_reason: FinishReason | None = None,
) -> ChunkChoice:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
