"""Dynamic batching: whoever waits when a forward pass ends shares the next one."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.heads import Head
from deltafold.runtime.embedded.trunk import Encoder, Way, row_of
from deltafold.runtime.engine import Stats
from deltafold.runtime.gate import GATE
from deltafold.runtime.host import DeltaHost, Row, Variant

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Task:
    """One request on its way.

    Attributes:
        variant: served name.
        digest: of what answers.
        holder: the loaded variant; None is the base.
        asked: the shared trunk, or a part of the variant's own dense model.
        way: text or image.
        inputs: see `Encoder.batch`.
        head: runs on the shared trunk's output; None leaves the output as it is.
        finish: makes the answer of the head's (the trunk's) output, on the worker's thread.
        lacks_pooler: the variant has no pooler of its own.
        future: the answer.
    """

    variant: str
    digest: str
    holder: Variant | None
    asked: Encoder
    way: Way
    inputs: Mapping[str, torch.Tensor]
    head: Head | None
    finish: Callable[[Task, Any], Any]
    lacks_pooler: bool = False
    future: Future[Any] = field(default_factory=Future)

    @property
    def config(self) -> Any:
        """The configuration of the class that answers."""
        return self.asked.config if self.head is None else self.head.config

    @property
    def tokens(self) -> int:
        """Tokens of the text; 0 for a picture."""
        return len(self.inputs["input_ids"]) if self.way == "text" else 0

    @property
    def origin(self) -> tuple[str, str, int]:
        """The fields of `Pooled`."""
        return self.variant, self.digest, self.tokens


class Batcher:
    """A thread that gathers what waits and runs it.

    Requests to the shared trunk share its batches, whatever their variants. Requests to a variant's own
    dense model share batches among themselves. Whoever waits longest is in the next one.

    Args:
        encoder: the wrapped trunk.
        host: of its variants.
        rows: most requests in one forward pass.
        places: most rows times tokens in one; a longer text runs alone.
    """

    def __init__(self, encoder: Encoder, host: DeltaHost, rows: int, places: int) -> None:
        self._encoder, self._host = encoder, host
        self._most_rows, self._most_places = rows, places
        self._wake = threading.Condition()
        self._waiting: deque[Task] = deque()
        self._running: list[Task] = []
        self._closing = False
        self._steps = self._base_only = self._tokens = 0
        self._thread = threading.Thread(target=self._run, name="deltafold-pooling", daemon=True)
        self._thread.start()

    def submit(self, tasks: Sequence[Task]) -> None:
        """Put tasks in line, all at once. Raises `busy` after `close`."""
        with self._wake:
            if self._closing:
                raise _closed()
            self._waiting.extend(tasks)
            self._wake.notify()

    def settle(self, tasks: Sequence[Task]) -> None:
        """Take tasks out of the line, and wait for those that run."""
        with self._wake:
            mine = set(map(id, tasks))
            self._waiting = deque(t for t in self._waiting if id(t) not in mine)
            self._wake.wait_for(lambda: not mine & set(map(id, self._running)))

    def stats(self, resident: Mapping[str, int]) -> Stats:
        """A snapshot for metrics."""
        with self._wake:
            by_variant = Counter(t.variant for t in self._running)
            return Stats(
                running=len(self._running),
                waiting=len(self._waiting),
                steps=self._steps,
                base_only_steps=self._base_only,
                prompt_tokens=self._tokens,
                generated_tokens=0,
                batch_variants=len({t.digest for t in self._running}),
                kv_tokens=0,
                kv_capacity=0,
                running_by_variant=dict(by_variant),
                resident=resident,
            )

    def close(self) -> None:
        """Finish the running batch and fail what waits with `busy`."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        # The current device belongs to a thread, and kernels start on the current one.
        if self._encoder.device.type == "cuda":
            torch.cuda.set_device(self._encoder.device)
        while self._take():
            try:
                with GATE.computing():
                    self._step(self._running)
            except Exception as error:  # a bug of ours: nobody may be left waiting
                _log.exception("a batch failed")
                _fail(self._running, error)
            with self._wake:
                self._running = []
                self._wake.notify_all()
        with self._wake:
            _fail(self._waiting, _closed())
            self._waiting.clear()

    def _take(self) -> bool:
        """Wait for tasks and move those that fit together to `_running`; False when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._waiting)
            if self._closing:
                return False
            chosen: list[Task] = []
            left: deque[Task] = deque()
            longest = 0
            for task in self._waiting:
                together = max(longest, task.tokens) * (len(chosen) + 1)
                fits = not chosen or (
                    len(chosen) < self._most_rows
                    and together <= self._most_places
                    and self._kind(task) == self._kind(chosen[0])
                )
                (chosen if fits else left).append(task)
                longest = max(longest, task.tokens) if fits else longest
            self._waiting, self._running = left, chosen
            return True

    def _kind(self, task: Task) -> object:
        """Tasks of one kind fit into one batch."""
        return id(task.asked), task.asked.kind(task.way, task.inputs)

    def _step(self, tasks: list[Task]) -> None:
        try:
            inputs, output = self._forward(tasks)
        except Exception as error:
            if len(tasks) == 1:
                _fail(tasks, error)
                return
            # Whose fault it was shows when each runs alone; the others get their answers.
            for task in tasks:
                self._step([task])
            return
        for row, task in enumerate(tasks):
            try:
                task.future.set_result(_answer(task, row, inputs, output))
            except Exception as error:
                _fail([task], error)

    @torch.inference_mode()
    def _forward(self, tasks: Sequence[Task]) -> tuple[Mapping[str, Any], Any]:
        way, asked = tasks[0].way, tasks[0].asked
        inputs = asked.batch(way, [t.inputs for t in tasks])
        shared = asked is self._encoder
        with self._host.batch([Row(t.holder) for t in tasks]) if shared else nullcontext():
            output = asked.run(way, inputs)
        self._steps += 1
        self._base_only += all(t.holder is None for t in tasks)
        self._tokens += sum(t.tokens for t in tasks)
        return inputs, output


@torch.inference_mode()
def _answer(task: Task, row: int, inputs: Mapping[str, Any], output: Any) -> Any:
    tokens = task.tokens if task.way == "text" else None
    mine = row_of(output, row, tokens)
    if task.head is not None:
        own = {n: v[row : row + 1] for n, v in inputs.items()}
        if tokens is not None:
            own = {n: v[:, :tokens] for n, v in own.items()}
        mine = task.head.run(own, mine)
    return task.finish(task, mine)


def _fail(tasks: Sequence[Task] | deque[Task], error: Exception) -> None:
    for task in tasks:
        if not task.future.done():
            task.future.set_exception(error)


def _closed() -> DeltafoldError:
    return DeltafoldError("busy", "the engine is closed and takes no more requests.")
