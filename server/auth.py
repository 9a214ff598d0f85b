"""Bearer keys."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deltafold.server.errors import ApiError

#: Probes and scrapers have no keys, and these routes tell no secrets.
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/metrics"})


def key_matches(header: str | None, keys: Sequence[str]) -> bool:
    """Whether an `Authorization` header carries one of the keys; time does not tell which."""
    scheme, _, given = (header or "").partition(" ")
    found = False
    for key in keys:
        found |= hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    return found and scheme.lower() == "bearer"


class KeyAuth:
    """ASGI middleware that answers 401 to requests without a key. No keys: everyone may."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str] = ()) -> None:
        if any(not key for key in keys):
            raise ValueError("an empty API key would let everyone in")
        self.app = app
        self.keys = tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through or refuse it."""
        guarded = scope["type"] == "http" and self.keys and scope["path"] not in OPEN_PATHS
        if guarded and not key_matches(Headers(scope=scope).get("authorization"), self.keys):
            refusal = ApiError(
                401,
                "missing or wrong API key; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await refusal.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)
