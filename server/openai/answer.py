"""From a request body to its reply, streamed or whole; chat and completions differ in a `Shape`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from deltafold.runtime.engine import Chunk
from deltafold.server.desk import desk_of
from deltafold.server.disconnect import unless_gone
from deltafold.server.errors import ErrorReply, json_response, request_id_of
from deltafold.server.generation import Generation, Job, Result
from deltafold.server.openai.replies import Usage, headers, usage
from deltafold.server.openai.schemas import Generate
from deltafold.server.openai.sse import EventStream

#: For `responses=` of routes: replaces FastAPI's own 422 in the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorReply, "description": "An OpenAI error object"}
}


class Shape(Protocol):
    """How one of the two APIs writes its replies."""

    async def prepare(self) -> None:
        """Get what needs the engine, once, before the first reply."""
        ...

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The reply to a request that is not streamed."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The event that begins a choice."""
        ...

    def piece(self, index: int, chunk: Chunk) -> dict[str, Any] | None:
        """The event for a chunk; None if it has nothing to tell."""
        ...

    def closing(self) -> dict[str, Any]:
        """An event without choices."""
        ...


async def answer(
    request: Request,
    body: Generate,
    jobs: Sequence[Job],
    shape_of: Callable[[Generation], Shape],
) -> Response:
    """Generate and reply. Whatever fails before the first token is an HTTP error status."""
    desk, request_id = desk_of(request), request_id_of(request)
    start = Generation.start(desk, body.model, jobs, request_id)
    generation = await unless_gone(request, start)
    streaming = False
    try:
        shape = shape_of(generation)
        await shape.prepare()
        if not body.stream:
            results = await unless_gone(request, generation.collect())
            reply = {**shape.whole(results), "usage": usage(generation)}
            return json_response(reply, headers=headers(generation))
        await unless_gone(request, generation.first())
        stream = EventStream(
            _events(generation, shape, body.wants_usage),
            on_close=generation.close,
            headers=headers(generation),
            request_id=request_id,
        )
        streaming = True  # the stream closes the generation
        return stream
    finally:
        if not streaming:
            generation.close()


async def _events(
    generation: Generation, shape: Shape, wants_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    extra: dict[str, Usage | None] = {"usage": None} if wants_usage else {}
    opened: set[int] = set()
    async for index, chunk in generation.chunks():
        opening = None if index in opened else shape.opening(index)
        opened.add(index)
        for event in (opening, shape.piece(index, chunk)):
            if event is not None:
                yield {**event, **extra}
    if wants_usage:
        yield {**shape.closing(), "usage": usage(generation)}
