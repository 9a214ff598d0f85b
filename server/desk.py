"""What every route needs: the engine once it is there, names, metrics, and threads to wait on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, ParamSpec, TypeVar, cast

from fastapi import Request

from deltafold.runtime.engine import Engine, Served, Stats, VariantInfo
from deltafold.runtime.pooled import Pooler
from deltafold.server.errors import ApiError
from deltafold.server.metrics import Metrics

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

#: Enough that a few slow loads from disk do not hold up requests for resident variants.
_THREADS = 32


class Desk:
    """The state of one application.

    Args:
        engine: the engine, or a promise of it while the base loads.
        served_model_name: one more name for the base, and the one that replies show.
        max_variant_labels: see `Metrics`.
    """

    def __init__(
        self,
        engine: Served | Future[Served],
        *,
        served_model_name: str | None = None,
        max_variant_labels: int = 100,
    ) -> None:
        self._engine = engine
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="deltafold-http")
        self.served_model_name = served_model_name
        self.metrics = Metrics(self._stats, max_variant_labels=max_variant_labels)

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        """How far the engine is."""
        if not isinstance(self._engine, Future):
            return "ready"
        if not self._engine.done():
            return "loading"
        failed = self._engine.cancelled() or self._engine.exception() is not None
        return "failed" if failed else "ready"

    @property
    def engine(self) -> Served:
        """The engine, whichever kind it is.

        Raises:
            ApiError: 503 while it loads, or when it could not be loaded.
        """
        if self.state == "loading":
            raise ApiError(503, "the base model is still loading", code="engine_loading")
        if self.state == "failed":
            message = "the base model could not be loaded; the server's log says why"
            raise ApiError(503, message, code="engine_failed")
        return self._engine.result() if isinstance(self._engine, Future) else self._engine

    @property
    def generator(self) -> Engine:
        """The engine, for routes that generate.

        Raises:
            ApiError: as `engine`, and where the base does not generate.
        """
        engine = self.engine
        if not hasattr(engine, "submit"):
            raise ApiError(
                400,
                f"{engine.base_name} does not generate text; it is served on /v1/embeddings and"
                " /classify",
                code="not_a_generating_model",
                param="model",
            )
        return cast(Engine, engine)

    @property
    def pooler(self) -> Pooler:
        """The engine, for routes that give labels and vectors.

        Raises:
            ApiError: as `engine`, and where the base generates.
        """
        engine = self.engine
        if not hasattr(engine, "embed"):
            raise ApiError(
                400,
                f"{engine.base_name} is served to generate text, not to embed or classify; start the"
                " server with --runner pooling for that",
                code="not_a_pooling_model",
                param="model",
            )
        return cast(Pooler, engine)

    async def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run on a thread what may block: loading a variant, reading the zoo."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: work(*args, **kwargs))

    def spawn(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Like `call`, but nobody waits; a failure goes to the log."""

        def logged() -> None:
            try:
                work(*args, **kwargs)
            except Exception:
                log.exception("background work failed")

        with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
            self._pool.submit(logged)

    def shown_name(self, info: VariantInfo) -> str:
        """The name that replies and lists show."""
        return self.served_model_name or info.name if info.parent is None else info.name

    def _stats(self) -> Stats | None:
        return self.engine.stats() if self.state == "ready" else None


def desk_of(request: Request) -> Desk:
    """The desk of the application that serves this request."""
    return cast(Desk, request.app.state.desk)
