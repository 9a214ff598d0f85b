"""From streams of chunks to finished outputs, for callers who want no streams."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence

from deltafold.runtime.engine import Chunk, OnChunk, Output, Request, Ticket


class _Collector:
    """Keeps one request's chunks and reports the last one."""

    def __init__(self, done: queue.SimpleQueue[None]) -> None:
        self.ticket: Ticket | None = None
        self._chunks: list[Chunk] = []
        self._done = done

    def __call__(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        if chunk.finish_reason is not None:
            self._done.put(None)

    @property
    def finished(self) -> bool:
        return bool(self._chunks) and self._chunks[-1].finish_reason is not None

    def output(self) -> Output:
        """The finished request. Raises the error that ended it."""
        last, ticket = self._chunks[-1], self.ticket
        assert ticket is not None
        assert last.finish_reason is not None
        if last.error is not None:
            raise last.error
        return Output(
            variant=ticket.variant,
            digest=ticket.digest,
            text="".join(c.text for c in self._chunks),
            token_ids=tuple(t for c in self._chunks for t in c.token_ids),
            prompt_tokens=len(ticket.prompt_ids),
            finish_reason=last.finish_reason,
            logprobs=tuple(x for c in self._chunks for x in c.logprobs),
            prompt_logprobs=tuple(ticket.prompt_logprobs),
        )


def gather(
    submit: Callable[[Sequence[tuple[Request, OnChunk]]], list[Ticket]],
    cancel: Callable[[str], None],
    requests: Sequence[Request],
    *,
    window: int,
) -> Iterator[Output]:
    """Outputs in the requests' order, with at most `window` requests unfinished at a time.

    The window keeps a long list from holding every variant in memory at once. Requests that are
    left when the caller stops, or when one fails, are cancelled.
    """
    done: queue.SimpleQueue[None] = queue.SimpleQueue()
    collectors: list[_Collector] = []
    unfinished = given = 0
    try:
        while given < len(requests):
            fresh = requests[len(collectors) : len(collectors) + window - unfinished]
            new = [_Collector(done) for _ in fresh]
            tickets = submit(list(zip(fresh, new, strict=True))) if new else []
            for collector, ticket in zip(new, tickets, strict=True):
                collector.ticket = ticket
            collectors += new
            unfinished += len(new)
            while given < len(collectors) and collectors[given].finished:
                yield collectors[given].output()
                collectors[given] = _Collector(done)  # lets go of the chunks
                given += 1
            if given < len(requests):
                done.get()
                unfinished -= 1
    finally:
        for collector in collectors[given:]:
            if collector.ticket is not None and not collector.finished:
                cancel(collector.ticket.id)
