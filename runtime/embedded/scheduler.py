"""Which rows run in the next step: admission, prefill groups and giving up rows.

Why an own scheduler: transformers has continuous batching too, but the places where an engine for
many variants must reach in (which row runs which variant, a seed and log-probabilities per request,
a row leaving at a stop string) are private there and move with every minor release, and it covers
part of the model families only. What is used here is what every causal language model of
transformers promises: tokens, a two-dimensional mask, positions and a cache object go in, logits
come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltafold.runtime.embedded.cache import BatchCache
from deltafold.runtime.embedded.job import Job
from deltafold.runtime.embedded.overlay import Overlay
from deltafold.runtime.embedded.waiting import Waiting

#: Tokens of growth that must be free per row when a request is admitted, so that it does not lose
#: its row again right away.
_SLACK = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Attributes:
    rows: most rows of the running batch.
    tokens: most key-value columns times rows, padding included.
    model_len: most tokens of one request, prompt and output together.
    chunk: most prompt tokens in one forward pass; bounds how long running rows wait.
    whole_prompts: read each prompt alone and in one pass, however long it is.
    """

    rows: int
    tokens: int
    model_len: int
    chunk: int
    whole_prompts: bool = False


@dataclass(slots=True)
class Prefill:
    """Requests whose prompts are being read.

    Either several, whose prompts fit into one pass side by side, or one that takes as many passes
    as it needs. So a row is never padded by more than a chunk.
    """

    jobs: list[Job]
    cache: BatchCache
    done: int = 0

    @property
    def width(self) -> int:
        """Columns of the whole rectangle."""
        return max(len(s.tokens) for s in self.jobs)

    def next_tokens(self, limits: Limits) -> tuple[list[list[int]], list[int]]:
        """The next pass: tokens `[rows][columns]`, and padding columns per row."""
        width = self.width
        padding = [width - len(s.tokens) for s in self.jobs]
        in_parts = len(self.jobs) == 1 and not limits.whole_prompts
        stop = min(width, self.done + limits.chunk) if in_parts else width
        padded = [[0] * p + s.tokens for p, s in zip(padding, self.jobs, strict=True)]
        return [row[self.done : stop] for row in padded], padding

    def overlays(self, columns: int) -> list[Overlay | None] | None:
        """Input embeddings of the next pass over so many columns, a row each; or None."""
        found: list[Overlay | None] = []
        for job in self.jobs:
            start = self.done - (self.width - len(job.tokens))
            part = job.overlay.within(start, start + columns) if job.overlay else None
            found.append(part if part is not None and len(part.positions) else None)
        return found if any(part is not None for part in found) else None


def pick_group(waiting: Waiting, running: Sequence[Job], limits: Limits) -> list[Job]:
    """Take the requests out of `waiting` that are read together next; may be empty."""
    group: list[Job] = []
    while head := waiting.peek([*running, *group]):
        if not (_shares_pass(group, head, limits) and _fits(running, group, head, limits)):
            break
        waiting.remove(head)
        group.append(head)
    return group


def _shares_pass(group: Sequence[Job], head: Job, limits: Limits) -> bool:
    if not group:
        return True
    if limits.whole_prompts:
        return False
    if head.wants_prompt_logprobs or group[0].wants_prompt_logprobs:
        return False  # logits of every position, for one request at a time
    return (len(group) + 1) * max(len(s.tokens) for s in (*group, head)) <= limits.chunk


def _fits(running: Sequence[Job], group: Sequence[Job], head: Job, limits: Limits) -> bool:
    rows = len(running) + len(group) + 1
    longest = max(len(s.tokens) for s in (*running, *group, head))
    return rows == 1 or (rows <= limits.rows and rows * (longest + _SLACK) <= limits.tokens)


def find_victims(head: Job | None, running: Sequence[Job], limits: Limits) -> list[Job]:
    """Running requests that must give up their rows; they wait and are read again later.

    The youngest goes first, so that the oldest always gets on. Rows go when memory is short, and
    one row goes when a single variant holds all rows while `head`, the next to be admitted, is of
    another variant and has no room.
    """
    left = sorted(running, key=lambda s: s.order)
    victims: list[Job] = []
    while len(left) > 1 and len(left) * max(len(s.tokens) for s in left) > limits.tokens:
        victims.append(left.pop())
    if victims or head is None or len(left) < 2 or _fits(left, [], head, limits):
        return victims
    if {s.ticket.digest for s in left} == {left[0].ticket.digest} - {head.ticket.digest}:
        victims.append(left.pop())
    return victims
