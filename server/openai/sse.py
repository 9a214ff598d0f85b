"""Server-sent events on Starlette's streaming response."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deltafold.server.errors import ApiError, internal_error, json_bytes

log = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """A stream of JSON events that ends in `data: [DONE]`.

    Args:
        events: the events; an `ApiError` that they raise becomes the last one.
        on_close: called when the stream ends, in whichever way.
        headers: added to the reply.
        request_id: what the log calls a failure.
    """

    def __init__(
        self,
        events: AsyncIterator[object],
        *,
        on_close: Callable[[], None],
        headers: Mapping[str, str],
        request_id: str,
    ) -> None:
        # Proxies must pass events on as they come.
        unbuffered = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(
            _encoded(events, request_id),
            headers={**unbuffered, **headers},
            media_type="text/event-stream",
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. The generator's own `finally` would run only when it is collected."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def _encoded(events: AsyncIterator[object], request_id: str) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield _event(event)
    except ApiError as error:
        yield _event(error.body())
    except Exception:
        log.exception("request %s failed in mid-stream", request_id)
        yield _event(internal_error(request_id).body())
    yield b"data: [DONE]\n\n"


def _event(value: object) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"
