"""What the engine's thread does: read prompts, decode, hand out tokens, let rows go.

Everything here runs on one thread and needs no locks. A step is one pass over a piece of waiting
prompts and one pass over all running rows, so that a long prompt never holds up running rows for
longer than one piece takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafold.runtime.embedded.cache import BatchCache
from deltafold.runtime.embedded.delivery import Delivery
from deltafold.runtime.embedded.job import Job
from deltafold.runtime.embedded.overlay import Overlay
from deltafold.runtime.embedded.runner import Runner
from deltafold.runtime.embedded.sampler import Choice, choose, prompt_logprobs
from deltafold.runtime.embedded.scheduler import Limits, Prefill, find_victims, pick_group
from deltafold.runtime.embedded.waiting import Waiting
from deltafold.runtime.engine import FinishReason


class Loop:
    """The batch and the steps that advance it.

    Attributes:
        waiting: accepted requests without a row.
        running: requests with a row; index = row of the cache.
    """

    def __init__(self, runner: Runner, limits: Limits, delivery: Delivery) -> None:
        """An idle loop of one model."""
        self.waiting = Waiting()
        self.running: list[Job] = []
        self.counters = delivery.counters
        self._runner = runner
        self._limits = limits
        self._delivery = delivery
        self._cache: BatchCache | None = None
        self._prefill: Prefill | None = None

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self._prefill or len(self.waiting))

    @property
    def reading(self) -> list[Job]:
        """Requests whose prompts are being read."""
        prefill = self._prefill
        return prefill.jobs if prefill else []

    @property
    def cache_capacity(self) -> tuple[int, int]:
        """Rows and columns that memory is allocated for."""
        return self._cache.capacity if self._cache else (0, 0)

    @torch.inference_mode()
    def step(self) -> None:
        """Advance everything a little."""
        self._drop_cancelled()
        self._yield_rows()
        if self._prefill is None:
            self._start_prefill()
        if self._prefill is not None:
            self._read_prompts(self._prefill)
        if self.running:
            self._decode()

    def end_all(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End every request, whatever its state."""
        left = [*self.running, *self.reading, *self.waiting]
        self.waiting = Waiting()
        self.running, self._prefill, self._cache = [], None, None
        for job in left:
            self._delivery.end(job, reason, error)

    # Rows come.

    def _start_prefill(self) -> None:
        group = pick_group(self.waiting, self.running, self._limits)
        if group:
            width = max(len(s.tokens) for s in group)
            self._prefill = Prefill(group, self._runner.new_cache(width))

    def _read_prompts(self, prefill: Prefill) -> None:
        """One pass over the prompts; after the last one the rows join the running batch."""
        group = prefill.jobs
        try:
            logits = self._prompt_pass(prefill)
            choices = self._choose(logits, group) if prefill.done == prefill.width else None
        except Exception as error:
            self._prefill = None
            self._delivery.fail(group, error)
            return
        if choices is None:
            return
        self._prefill = None
        for job in group:
            job.cached = len(job.tokens)
            self.counters.prompt_tokens += 0 if job.counted else job.cached
            job.counted = True
        stay = self._deliver(group, choices)
        if len(stay) < len(group):
            gone = {i for i, s in enumerate(group) if s not in stay}
            stay = [group[i] for i in prefill.cache.drop(gone, len(group))]
        self._join(stay, prefill.cache)

    def _prompt_pass(self, prefill: Prefill) -> torch.Tensor:
        """Logits `[rows, vocabulary]` after the pass's last column."""
        group = prefill.jobs
        tokens, padding = prefill.next_tokens(self._limits)
        echo = group[0].wants_prompt_logprobs
        overlays = prefill.overlays(len(tokens[0]))
        logits = self._forward(
            prefill.cache, group, tokens, padding, every_position=echo, overlays=overlays
        )
        if echo:
            # Alone in its group, so without padding: column = position.
            first = prefill.done + 1
            targets = group[0].ticket.prompt_ids[first : first + len(tokens[0])]
            seen = self._mask(logits[0, : len(targets)], group)
            top = group[0].sampling.logprobs or 0
            group[0].add_prompt_logprobs(prompt_logprobs(seen, targets, top))
        prefill.done += len(tokens[0])
        return logits[:, -1]

    def _join(self, arrivals: list[Job], cache: BatchCache) -> None:
        if not arrivals:
            return
        if self._cache is None:
            self._cache = cache
        else:
            self._cache.join(cache)
        self.running.extend(arrivals)
        self._trim()

    # Rows run.

    def _decode(self) -> None:
        """One token for every running row."""
        assert self._cache is not None
        rows, columns = self.running, self._cache.columns
        try:
            tokens = [[s.tokens[-1]] for s in rows]
            padding = [columns - s.cached for s in rows]
            logits = self._forward(self._cache, rows, tokens, padding)
            choices = self._choose(logits[:, -1], rows)
        except Exception as error:
            # The pass may have stopped half way, so the cache cannot be trusted any more.
            self.running, self._cache = [], None
            self._delivery.fail(rows, error)
            return
        for job in rows:
            job.cached += 1
        stay = self._deliver(rows, choices)
        self._leave([s for s in rows if s not in stay])

    def _forward(
        self,
        cache: BatchCache,
        rows: Sequence[Job],
        tokens: list[list[int]],
        padding: list[int],
        *,
        every_position: bool = False,
        overlays: Sequence[Overlay | None] | None = None,
    ) -> torch.Tensor:
        self.counters.steps += 1
        self.counters.base_only_steps += all(s.variant is None for s in rows)
        return self._runner(
            cache,
            [s.row for s in rows],
            tokens,
            padding,
            every_position=every_position,
            overlays=overlays,
        )

    def _choose(self, logits: torch.Tensor, rows: Sequence[Job]) -> list[Choice]:
        """Next tokens, in the order of the rows."""
        masked = self._mask(logits, rows)
        return choose(masked, [s.sampling for s in rows], [s.random for s in rows])

    def _mask(self, logits: torch.Tensor, rows: Sequence[Job]) -> torch.Tensor:
        """Hide token ids that a row's variant lacks, in a batch with a bigger vocabulary."""
        known = [s.front.vocabulary or self._runner.vocabulary for s in rows]
        if min(known) >= logits.shape[-1]:
            return logits
        limit = torch.tensor(known, device=logits.device).unsqueeze(1)
        return logits.masked_fill(
            torch.arange(logits.shape[-1], device=logits.device) >= limit, float("-inf")
        )

    # Rows go.

    def _deliver(self, rows: Sequence[Job], choices: Sequence[Choice]) -> list[Job]:
        """Hand out a step's tokens; the requests that go on."""
        pairs = zip(rows, choices, strict=True)
        return [job for job, choice in pairs if self._delivery.deliver(job, choice)]

    def _drop_cancelled(self) -> None:
        for job in [s for s in self.waiting if s.cancelled]:
            self.waiting.remove(job)
            self._delivery.end(job, "cancelled")
        # A group that is read in several passes is a single request.
        if any(s.cancelled for s in self.reading):
            gone, self._prefill = self.reading, None
            for job in gone:
                self._delivery.end(job, "cancelled")
        gone = [s for s in self.running if s.cancelled]
        self._leave(gone)
        for job in gone:
            self._delivery.end(job, "cancelled")

    def _yield_rows(self) -> None:
        """Take rows back where memory or fairness demands it; those requests start over later."""
        head = None if self._prefill else self.waiting.peek(self.running)
        victims = find_victims(head, self.running, self._limits)
        self._leave(victims)
        for job in victims:
            job.cached = 0
            self.waiting.put_back(job)

    def _leave(self, gone: Sequence[Job]) -> None:
        """Remove rows from the batch."""
        if not gone:
            return
        assert self._cache is not None
        if len(gone) == len(self.running):
            self.running, self._cache = [], None
            return
        rows = {i for i, s in enumerate(self.running) if s in gone}
        order = self._cache.drop(rows, len(self.running))
        self.running = [self.running[i] for i in order]
        self._trim()

    def _trim(self) -> None:
        """Give up columns that every row has as padding."""
        assert self._cache is not None
        spare = self._cache.columns - max(s.cached for s in self.running)
        if spare:
            self._cache.trim(spare)
