"""The engine requests behind one HTTP call, seen from the event loop.

The engine calls back on its own thread; each chunk crosses to the loop through
`call_soon_threadsafe` into one queue for all choices of the call. Whoever starts a generation
closes it: what is still running is then cancelled in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from deltafold.runtime.engine import (
    Chunk,
    Engine,
    FinishReason,
    Prompt,
    Request,
    Sampling,
    Ticket,
    TokenLogprob,
    VariantInfo,
)
from deltafold.server.desk import Desk
from deltafold.server.errors import ApiError, from_exception
from deltafold.server.metrics import Watch
from deltafold.server.openai.selector import Selector, find, fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One choice to generate: prompt number `source` of the HTTP request, sampled once."""

    prompt: Prompt
    sampling: Sampling
    source: int = 0


@dataclass(slots=True)
class Result:
    """One finished choice."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> None:
        """Append what one step brought."""
        self.text += chunk.text
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason


class Generation:
    """Some jobs for one model. Make it with `start`; all methods are for the event loop."""

    info: VariantInfo
    fingerprint: str

    def __init__(self, desk: Desk, jobs: Sequence[Job], request_id: str) -> None:
        self.desk = desk
        self.engine: Engine = desk.generator
        self.jobs = jobs
        self.request_id = request_id
        self.tickets: list[Ticket] = []
        self.generated_tokens = 0
        self._arrived = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Chunk]] = asyncio.Queue()
        self._head: tuple[int, Chunk] | None = None
        self._watches: list[Watch] = []
        self._finished: set[int] = set()
        self._open = len(jobs)

    @classmethod
    async def start(
        cls, desk: Desk, model: str, jobs: Sequence[Job], request_id: str
    ) -> Generation:
        """Submit the jobs.

        Raises:
            ApiError: the engine is not there yet.
            DeltafoldError: the engine refused one of the jobs; none is left running.
        """
        generation = cls(desk, jobs, request_id)
        work = asyncio.ensure_future(desk.call(generation._submit, model))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # The thread cannot be stopped, but what it has submitted by then can.
            work.add_done_callback(lambda _: generation.close())
            raise
        return generation

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; choices of one prompt share it."""
        pairs = zip(self.jobs, self.tickets, strict=True)
        lengths = {job.source: len(ticket.prompt_ids) for job, ticket in pairs}
        return sum(lengths.values())

    async def first(self) -> None:
        """Wait for the first chunk and keep it for `chunks`; raises what it reports."""
        self._head = await self._next()

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Each chunk with the index of its job, until all jobs have ended.

        Raises:
            ApiError: a job failed, or the engine shuts down.
        """
        while self._head is not None or self._open:
            item = self._head or await self._next()
            self._head = None
            yield item

    async def collect(self) -> list[Result]:
        """Wait for every job's result."""
        results = [Result() for _ in self.jobs]
        async for index, chunk in self.chunks():
            results[index].add(chunk)
        return results

    def close(self) -> None:
        """Cancel what is still running. Never blocks, may be called twice."""
        running = [t for i, t in enumerate(self.tickets) if i not in self._finished]
        if running:
            self._finished.update(range(len(self.jobs)))
            self.desk.spawn(_cancel, self.engine, running)

    async def _next(self) -> tuple[int, Chunk]:
        index, chunk = await self._queue.get()
        if chunk.finish_reason is not None:
            self._open -= 1
        if chunk.error is not None or chunk.finish_reason == "error":
            raise from_exception(chunk.error, self.request_id)
        if chunk.finish_reason == "cancelled":
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return index, chunk

    def _submit(self, model: str) -> None:
        """On a thread: find the model and hand the jobs to the engine."""
        selector, self.info = find(self.engine, model, self.desk.served_model_name)
        self.fingerprint = fingerprint(self.engine.resolve("base").digest, self.info)
        name = self.desk.shown_name(self.info)
        self._watches = [Watch(self.desk.metrics, name, self._arrived) for _ in self.jobs]
        try:
            for index, job in enumerate(self.jobs):
                self._submit_one(index, job, selector)
        except BaseException:
            _cancel(self.engine, self.tickets)
            raise

    def _submit_one(self, index: int, job: Job, selector: Selector) -> None:
        def on_chunk(chunk: Chunk) -> None:
            # A closed loop has nobody left to tell; the engine must not suffer for it.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver, index, chunk)

        request = Request(self.info.name, job.prompt, job.sampling)
        ticket = self.engine.submit(request, on_chunk)
        self.tickets.append(ticket)
        # The zoo may have changed since the name was resolved.
        selector.check(self.info.name, ticket.digest)
        self._watches[index].accepted(len(ticket.prompt_ids))

    def _deliver(self, index: int, chunk: Chunk) -> None:
        self._watches[index].saw(chunk)
        self.generated_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self._finished.add(index)
        self._queue.put_nowait((index, chunk))


def _cancel(engine: Engine, tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        engine.cancel(ticket.id)
