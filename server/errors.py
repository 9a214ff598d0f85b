"""One table from error codes to HTTP statuses, and the OpenAI error object.

Whose fault it is decides the status. A request that can be mended is 4xx and carries the facts and
the fix. A delta that cannot be served (damaged, incomplete, of a newer format) is 503
`variant_unavailable`: the server is fine and every other model answers. Such a reply says
`x-should-retry: false`, which the official clients honour, because trying again cannot help until
an operator acts. What does pass by itself (`busy`, `not-enough-memory`) says `retry-after`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from deltafold.compress.errors import DeltafoldError

log = logging.getLogger(__name__)

_UNAVAILABLE: Final = (503, "variant_unavailable")

#: Every code of `deltafold.compress.errors.CODES`: HTTP status and the `code` that clients see.
STATUSES: Final[dict[str, tuple[int, str]]] = {
    "bad-argument": (400, "bad_argument"),
    "bad-recipe": (400, "bad_recipe"),
    "context-length": (400, "context_length_exceeded"),
    "variant-not-found": (404, "model_not_found"),
    "base-mismatch": (409, "base_mismatch"),
    "exists": (409, "exists"),
    "busy": (503, "busy"),
    "not-enough-memory": (503, "not_enough_memory"),
    "not-enough-disk": (507, "not_enough_disk"),
    "engine-unsupported": (501, "engine_unsupported"),
    "missing-extra": (501, "missing_extra"),
    "unknown-codec": _UNAVAILABLE,
    "needs-calibration": _UNAVAILABLE,
    "unexpected-tensor": _UNAVAILABLE,
    "missing-tensor": _UNAVAILABLE,
    "shape-mismatch": _UNAVAILABLE,
    "tokenizer-changed": _UNAVAILABLE,
    "input-changed": _UNAVAILABLE,
    "not-finite": _UNAVAILABLE,
    "coverage": _UNAVAILABLE,
    "checksum": _UNAVAILABLE,
    "truncated": _UNAVAILABLE,
    "newer-format": _UNAVAILABLE,
    "bad-manifest": _UNAVAILABLE,
    "not-a-delta": _UNAVAILABLE,
    "not-lossless": _UNAVAILABLE,
    "not-found": _UNAVAILABLE,
    "not-a-checkpoint": _UNAVAILABLE,
}

_PASSING: Final = frozenset({"busy", "not_enough_memory", "engine_loading", "shutting_down"})
_ABOUT_MODEL: Final = frozenset({"model_not_found", "base_mismatch", "variant_unavailable"})


class ErrorObject(TypedDict):
    """What went wrong, in the words of the OpenAI API."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """The body of every reply that is not a success."""

    error: ErrorObject


class ApiError(Exception):
    """An error on its way to the client.

    Args:
        status: HTTP status.
        message: what happened and what to do, for the client to read.
        code: stable and searchable.
        param: the request's field that is to blame.
        headers: added to the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if status == 409 or (status > 500 and code not in _PASSING):
            self.headers.setdefault("x-should-retry", "false")
        elif status == 503:
            self.headers.setdefault("retry-after", "1")

    def body(self) -> ErrorReply:
        """The OpenAI error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 401:
            kind = "authentication_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The HTTP reply."""
        return json_response(self.body(), status=self.status, headers=self.headers)


def json_bytes(value: object) -> bytes:
    """Compact UTF-8 JSON; half surrogate pairs, which a client can send, become `?`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def json_response(
    value: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON reply."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def from_deltafold(error: DeltafoldError) -> ApiError:
    """Translate one of our own errors by the table."""
    status, code = STATUSES.get(error.code, (500, "internal_error"))
    message = error.message
    if status < 500:
        # Facts and fix are for whoever can act: below 500 that is the client.
        facts = "; ".join(f"{label}: {value}" for label, value in error.facts)
        message += f" ({facts})" if facts else ""
        message += f" Fix: {error.fix}" if error.fix else ""
    param = "model" if code in _ABOUT_MODEL else None
    return ApiError(status, message, code=code, param=param)


def from_exception(error: BaseException | None, request_id: str) -> ApiError:
    """What a client may know of a failure; what it may not know goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DeltafoldError):
        api_error = from_deltafold(error)
        if api_error.status >= 500:
            log.error("request %s: %s", request_id, error)
        return api_error
    log.error("request %s failed", request_id, exc_info=error)
    return internal_error(request_id)


def internal_error(request_id: str) -> ApiError:
    """A bug of ours: the client gets the id under which the log has the rest."""
    message = f"internal error; the server's log has it under request id {request_id}"
    return ApiError(500, message, code="internal_error")


def request_id_of(request: Request) -> str:
    """The id that `RequestContext` gave this request."""
    return str(getattr(request.state, "request_id", "-"))


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a request's body, naming the field."""
    first: Mapping[str, Any] = error.errors()[0]
    context: Mapping[str, Any] = first.get("ctx") or {}
    param = _path((*first["loc"][1:], *filter(None, [context.get("param")])))
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {context.get('error')}", code="invalid_json")
    if kind == "extra_forbidden":
        message = f"unknown field '{param}'; /openapi.json lists the fields that are understood"
        return ApiError(400, message, code="unknown_field", param=param)
    if kind == "missing" and param:
        return ApiError(400, f"field '{param}' is required", code="missing_field", param=param)
    if not param:
        return ApiError(400, _about_the_body(first), code="invalid_body")
    code = "unsupported_value" if kind == "unsupported_value" else "invalid_value"
    text = str(context["error"]) if kind == "value_error" else str(first["msg"])
    return ApiError(400, f"{param}: {text}", code=code, param=param)


def _about_the_body(first: Mapping[str, Any]) -> str:
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return "the body must be a JSON object, sent with the header content-type: application/json"


def _path(location: tuple[str | int, ...]) -> str | None:
    """`messages[0].content`, as the OpenAI API writes it."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path or None


def install_handlers(app: FastAPI) -> None:
    """Make every error of the application an OpenAI error object."""

    async def on_api_error(request: Request, error: Exception) -> Response:
        return from_exception(error, request_id_of(request)).response()

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error).response()

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        api_error = ApiError(error.status_code, str(error.detail), headers=error.headers)
        return api_error.response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(DeltafoldError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
