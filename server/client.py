"""A client of the standard library, so that chatting needs no extra packages."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

from deltafold.compress.errors import DeltafoldError
from deltafold.server.addresses import is_loopback

#: A server that says nothing for so long is gone; a cold variant may take a while to load.
_TIMEOUT_SECONDS: Final = 600

_CODES: Final = {404: "variant-not-found", 503: "busy"}


class Client:
    """Talks to one server.

    Args:
        url: the server's address, with or without a final `/v1`.
        api_key: sent as a bearer key.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        host = _host(url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        # A proxy of the environment cannot reach this machine's own servers.
        no_proxy = [urllib.request.ProxyHandler({})] if is_loopback(host) else []
        self._opener = urllib.request.build_opener(*no_proxy)

    def models(self) -> list[str]:
        """Names of what is served, the base first."""
        with self._open("/v1/models") as reply:
            return [str(card["id"]) for card in _json(reply.read())["data"]]

    def model(self, name: str) -> str:
        """The name itself, once the server has said that it serves it."""
        with self._open(f"/v1/models/{urllib.parse.quote(name, safe='/@:')}") as reply:
            reply.read()
        return name

    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int | None,
        temperature: float,
    ) -> Iterator[str]:
        """The answer, piece by piece. Closing the iterator cancels the request."""
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "temperature": temperature,
            "stream": True,
        }
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        with self._open("/v1/chat/completions", body) as reply:
            for event in self._events(reply):
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    def _events(self, reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        try:
            for line in reply:
                data = line.decode("utf-8").strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data:
                    yield _checked(_json(data))
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        raise DeltafoldError("busy", f"{self.url} broke off its answer", fix="see the server's log")

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            reply = self._opener.open(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, error.read()) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        return cast(http.client.HTTPResponse, reply)

    def _unreachable(self, error: Exception) -> DeltafoldError:
        reason = getattr(error, "reason", None) or error
        return DeltafoldError(
            "not-found",
            f"no server answers at {self.url}: {reason}",
            fix="start one with 'deltafold serve BASE --zoo ZOO', or give its address with --url",
        )


def _host(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts.hostname
    except ValueError:
        pass
    fix = "--url http://127.0.0.1:8000"
    raise DeltafoldError("bad-argument", f"'{url}' is not an http address", fix=fix)


def _json(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        message = "the address answers, but not as an OpenAI-compatible server"
        raise DeltafoldError("bad-argument", message, fix="check --url")
    return value


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise DeltafoldError("busy", f"the server failed: {event['error'].get('message')}")
    return event


def _refusal(status: int, body: bytes) -> DeltafoldError:
    """The server's own words where it has any."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = "no OpenAI-compatible server is at this address"
    fix = {401: "--api-key KEY, or set DELTAFOLD_API_KEY", 404: "/models lists what is served"}
    code = _CODES.get(status, "busy" if status >= 500 else "bad-argument")
    return DeltafoldError(code, f"{message} (HTTP {status})", fix=fix.get(status, ""))
