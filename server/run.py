"""Run an application: bind a socket, serve in a thread."""

from __future__ import annotations

import errno
import socket
import threading
import time
from types import TracebackType

import uvicorn
from starlette.types import ASGIApp

from deltafold.compress.errors import DeltafoldError

#: How long running requests may go on after a server was told to stop.
GRACE_SECONDS = 10


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one.

    Raises:
        DeltafoldError: `busy` when the port is taken, `bad-argument` for an address that is not
            this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is taken by another program"
            fix = "choose another one with --port, or --port 0 for any free one"
            raise DeltafoldError("busy", message, fix=fix) from error
        message = f"cannot listen on {host} port {port}: {error.strerror or error}"
        fix = "--host takes an address of this machine, --port a number that you may use"
        raise DeltafoldError("bad-argument", message, fix=fix) from error


def url_of(listener: socket.socket) -> str:
    """The address to reach a listening socket at."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server that leaves the logging configuration alone."""
    config = uvicorn.Config(
        app,
        log_config=None,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return uvicorn.Server(config)


class BackgroundServer:
    """Serves an application from a thread while the `with` block runs.

    Args:
        app: the application.
        host: where to listen.
        port: 0 picks a free one.
    """

    def __init__(self, app: ASGIApp, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = make_server(app)
        self._listener = bind(host, port)
        self._thread = threading.Thread(target=self._run, name="deltafold-server", daemon=True)
        #: `http://127.0.0.1:PORT`
        self.url = url_of(self._listener)

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        if not self._server.started:
            self._listener.close()
            raise RuntimeError("the server did not start; the log says why")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])
