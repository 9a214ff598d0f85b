"""What surrounds every request: its id, the count of replies, and the last net for bugs."""

from __future__ import annotations

import logging
import re
import uuid
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltafold.server.errors import internal_error
from deltafold.server.metrics import Metrics

log = logging.getLogger(__name__)

#: A client's own id is kept if it cannot forge log lines or headers.
_SANE_ID: Final = re.compile(r"[A-Za-z0-9._:/-]{1,128}")


class RequestContext:
    """ASGI middleware, the outermost one.

    Plain ASGI on purpose: Starlette's `BaseHTTPMiddleware` hides disconnects from the routes.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                stamp = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), stamp]}
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        except ClientDisconnect:
            log.debug("request %s: the client left", request_id)
        except Exception:
            log.exception("request %s failed", request_id)
            if not status:  # else the server breaks the connection: the reply is incomplete
                await internal_error(request_id).response()(scope, receive, stamped)
        finally:
            self.metrics.count_reply(_route(scope), status)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _route(scope: Scope) -> str:
    """The route's pattern, never the raw path: a label must not grow with what clients ask."""
    return str(getattr(scope.get("route"), "path", "_none"))
