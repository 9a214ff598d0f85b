"""The embedded engine: one transformers model in this process, every variant beside it."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.deltas import Rebuild
from deltafold.runtime.embedded.batches import Batches
from deltafold.runtime.embedded.delivery import Delivery
from deltafold.runtime.embedded.drafts import output_context
from deltafold.runtime.embedded.gather import gather
from deltafold.runtime.embedded.job import Job
from deltafold.runtime.embedded.lanes import Lanes
from deltafold.runtime.embedded.opening import open_model
from deltafold.runtime.embedded.reception import Reception
from deltafold.runtime.embedded.runner import Runner
from deltafold.runtime.embedded.scheduler import Limits
from deltafold.runtime.engine import (
    OnChunk,
    Output,
    Prompt,
    Request,
    Stats,
    Ticket,
    VariantInfo,
)
from deltafold.runtime.gate import GATE
from deltafold.runtime.host import DeltaHost

_log = logging.getLogger(__name__)


class EmbeddedEngine:
    """Serves a base and its variants in mixed batches, on a thread of its own.

    Threads: `submit`, `cancel`, `encode`, `decode`, `stats` and the rest may be called from any
    thread. Forward passes and `on_chunk` happen on the engine's thread alone.

    Repeatability: a request's tokens depend on its own logits, settings and seed. Logits of a batch
    of another shape may differ in their last bits, as with every engine; base rows are otherwise
    bit for bit what the plain model computes for a batch of the same shape.
    """

    def __init__(
        self,
        model: Any,
        host: DeltaHost,
        *,
        max_batch: int = 32,
        max_model_len: int | None = None,
        max_batch_tokens: int | None = None,
        prefill_chunk: int = 256,
    ) -> None:
        """Start the engine; nothing runs until the first request.

        Args:
            model: a model of transformers that generates, already prepared by `host`. Requests of
                models with an encoder, and all that bring images or sounds, are written in whole
                batches (see `batches`); others join and leave the running batch at every token.
            host: holder of the variants. The engine does not close it.
            max_batch: most requests that run together on one model. A variant with a dense model of
                its own has a batch of its own, and the bounds below hold for each.
            max_model_len: most tokens of one request; never more than the model's own context.
            max_batch_tokens: bound of key-value memory, in rows times columns (every row takes as
                many columns as the longest); None means that nothing but the two above bounds it.
                Requests that outgrow it lose their row for a while and are read again.
            prefill_chunk: most prompt tokens in one forward pass. Running requests wait for
                one such pass per token while prompts are being read. Models with recurrent layers read
                prompts whole, one after another.

        Raises:
            DeltafoldError: `bad-argument`; `engine-unsupported` for models that cannot be batched.
        """
        for name, value in (
            ("max_batch", max_batch),
            ("max_model_len", max_model_len),
            ("max_batch_tokens", max_batch_tokens),
            ("prefill_chunk", prefill_chunk),
        ):
            if value is not None and value < 1:
                raise DeltafoldError("bad-argument", f"{name} must be 1 or more, not {value}.")
        # Encoders answer once and for a whole batch, so nobody can join it later.
        runner = None if model.config.is_encoder_decoder else Runner(model, host)
        context = output_context(model) if runner is None else runner.context
        length = min(x for x in (context, max_model_len, max_batch_tokens) if x)
        self.base_name = host.base_name
        self._host, self._model = host, model
        self._limits = Limits(
            rows=max_batch,
            tokens=max_batch_tokens or max_batch * length,
            model_len=length,
            chunk=prefill_chunk,
            whole_prompts=runner is not None and runner.recurrent,
        )
        self._reception = Reception(model, host, runner, self._limits)
        delivery = Delivery(self._on_end)
        batches = Batches(model, host, max_batch, delivery)
        self._lanes = Lanes(runner, self._limits, delivery, batches)
        # Guards what follows; the thread sleeps on it.
        self._wake = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._live: dict[str, Job] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="deltafold-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        base: str | Path,
        zoo: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        served_model_name: str | None = None,
        max_deltas: int | None = None,
        strict: bool = True,
        base_quantization: str | None = None,
        rebuild: Rebuild = "auto",
        max_batch: int = 32,
        max_model_len: int | None = None,
        max_batch_tokens: int | None = None,
        prefill_chunk: int = 256,
    ) -> Self:
        """Load a base checkpoint, wrap it, and start an engine.

        Args:
            base: folder or hub id of the base.
            zoo: folder of delta repos; None serves the base alone.
            device: "auto", "cpu", "cuda", "cuda:1", ...
            dtype: None or "auto" for the checkpoint's own (float32 for small models on a CPU).
            served_model_name: what the base answers to besides "base".
            max_deltas: most variants in memory; None keeps all that were used.
            strict: refuse to start while a delta of the zoo is broken or for another base.
            base_quantization: `nf4` or `int8` keeps the base's linear layers in 4 or 8 bits.
            rebuild: "auto" serves a variant whose delta cannot be applied by a dense model of its
                own in memory; "never" refuses it.
            max_batch: see `__init__`, as for what follows.
            max_model_len: see `__init__`.
            max_batch_tokens: see `__init__`.
            prefill_chunk: see `__init__`.

        Raises:
            DeltafoldError: whatever is wrong with the base or, with `strict`, a delta.
        """
        opened = open_model(
            base,
            zoo,
            device=device,
            dtype=dtype,
            name=served_model_name,
            max_deltas=max_deltas,
            strict=strict,
            base_quantization=base_quantization,
            rebuild=rebuild,
        )
        return cls(
            opened.model,
            opened.deltas,
            max_batch=max_batch,
            max_model_len=max_model_len,
            max_batch_tokens=max_batch_tokens,
            prefill_chunk=prefill_chunk,
        )

    # Requests.

    def submit(self, request: Request, on_chunk: OnChunk) -> Ticket:
        """Accept a request (see `Engine.submit`); may block while a variant is read from disk.

        The first chunk may arrive before this returns.

        Raises:
            DeltafoldError: `variant-not-found`, `bad-argument`, `context-length`, `busy` after
                `close`, and every code that loading a delta can give.
        """
        return self.submit_together([(request, on_chunk)])[0]

    def submit_together(self, requests: Sequence[tuple[Request, OnChunk]]) -> list[Ticket]:
        """Accept several requests at once: all of them are in line before any of them runs.

        So requests that are given together share their batches from the first step on. Either all
        are accepted or none.

        Raises:
            DeltafoldError: as `submit`, for the first request that is refused.
        """
        jobs: list[Job] = []
        try:
            for request, on_chunk in requests:
                self._need_open()
                jobs.append(self._reception.job(request, on_chunk))
            with self._wake:
                self._need_open()
                self._live.update((job.ticket.id, job) for job in jobs)
                self._inbox.extend(jobs)
                self._wake.notify()
        except BaseException:
            for job in jobs:
                self._host.release(job.variant)
            raise
        return [job.ticket for job in jobs]

    def cancel(self, ticket_id: str) -> None:
        """Stop a request at the next step; unknown or finished ids are ignored."""
        with self._wake:
            job = self._live.get(ticket_id)
            if job is not None:
                job.cancelled = True
                self._wake.notify()

    def generate(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Run requests together and yield outputs in the requests' order.

        Requests are submitted as others finish, so that any number may be given. If the caller
        stops early, what is left is cancelled.

        Raises:
            DeltafoldError: as `submit`; and whatever made a request fail while it ran.
        """
        return gather(self.submit_together, self.cancel, requests, window=2 * self._limits.rows)

    # Variants and text.

    def variants(self) -> list[VariantInfo]:
        """The base and every variant of the zoo, sorted by name, the base first."""
        return self._host.variants()

    def resolve(self, name: str) -> VariantInfo:
        """The variant behind a name; `variant-not-found` names near ones."""
        return self._host.resolve(name)

    def encode(self, variant: str, prompt: Prompt) -> list[int]:
        """Token ids by the variant's own tokenizer and chat template."""
        return self._reception.front(variant).encode(prompt)

    def decode(self, variant: str, token_ids: Sequence[int]) -> str:
        """Text by the variant's own tokenizer, special tokens left out."""
        return self._reception.front(variant).decode(token_ids)

    # State.

    @property
    def max_model_len(self) -> int:
        """Most tokens, prompt and output together, that a request may have."""
        return self._limits.model_len

    def stats(self) -> Stats:
        """A snapshot for metrics."""
        counters = self._lanes.counters
        with self._wake:
            live = [s for s in self._live.values() if not s.ended]
        # A request that holds key-value memory, or whose prompt is being read, runs.
        reading = set(map(id, self._lanes.reading))
        running = [s for s in live if s.cached or id(s) in reading]
        by_variant = Counter(s.ticket.variant for s in running)
        return Stats(
            running=len(running),
            waiting=len(live) - len(running),
            steps=counters.steps,
            base_only_steps=counters.base_only_steps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            batch_variants=len({s.ticket.digest for s in running}),
            kv_tokens=sum(s.cached for s in running),
            kv_capacity=self._limits.tokens * self._lanes.models,
            running_by_variant=dict(by_variant),
            resident=self._host.resident(),
        )

    def close(self) -> None:
        """Finish the running step, fail what is left with `cancelled`, free memory.

        May be called twice, and from an `on_chunk`; then it returns before all is done.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The engine's thread.

    def _need_open(self) -> None:
        if self._closing:
            raise DeltafoldError("busy", "the engine is closed and takes no more requests.")

    def _run(self) -> None:
        error: Exception | None = None
        try:
            # The current device belongs to a thread, and kernels start on the current one.
            if self._model.device.type == "cuda":
                torch.cuda.set_device(self._model.device)
            while self._collect():
                with GATE.computing():
                    self._lanes.step(lambda: self._closing)
        except Exception as problem:  # a bug of ours: nobody may be left waiting
            _log.exception("the engine's thread stopped")
            error = problem
        with self._wake:
            self._closing = True
        self._take_inbox()
        self._lanes.end_all("error" if error else "cancelled", error)

    def _collect(self) -> bool:
        """Sleep until there is work; False when the engine is closing."""
        with self._wake:
            while not (self._closing or self._inbox or self._lanes.busy):
                self._wake.wait()
        self._take_inbox()
        return not self._closing

    def _take_inbox(self) -> None:
        while self._inbox:
            self._lanes.add(self._inbox.popleft())

    def _on_end(self, job: Job) -> None:
        """Called once per request, before its last chunk."""
        with self._wake:
            self._live.pop(job.ticket.id, None)
        try:
            self._host.release(job.variant)
        except Exception:
            _log.exception("releasing %s failed", job.ticket.variant)
