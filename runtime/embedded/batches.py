"""Requests that are written in whole batches, by transformers' own `generate`.

For models that read a text, an image or a sound first and write then: an encoder's answer and the
caches of cross attention belong to a batch from its first step on, so nobody joins later. Whoever
waits when a batch ends, and fits together, shares the next one. Within a batch each request has its
own variant, sampling, seed, end tokens and length, and gets its tokens as they are chosen.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from deltafold.runtime.embedded.delivery import Delivery
from deltafold.runtime.embedded.inputs import Brought, join
from deltafold.runtime.embedded.job import Job
from deltafold.runtime.embedded.sampler import choose
from deltafold.runtime.engine import FinishReason
from deltafold.runtime.host import DeltaHost

_log = logging.getLogger(__name__)

#: What `generate` would do by itself, and the engine does for each request.
_OWN = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "max_length": None,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "return_dict_in_generate": False,
    "cache_implementation": None,
    "use_cache": True,
}
#: Keys by which two generation configurations may differ and still mean the same here.
_SAYS_NOTHING = ("transformers_version", "_from_model_config", "bos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Writing:
    """What a request needs to be written in a whole batch.

    Attributes:
        brought: its inputs.
        config: its variant's generation configuration (suppressed tokens, first token, ...).
        model: the variant's own dense model; None for the shared one.
    """

    brought: Brought
    config: GenerationConfig
    model: Any | None

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """Requests of one kind fit into one batch."""
        settings = {n: v for n, v in self.config.to_dict().items() if n not in _SAYS_NOTHING}
        return (
            id(self.model),
            json.dumps(settings, sort_keys=True, default=str),
            self.brought.shapes,
        )


def generation_config(model: Any, folder: Path) -> GenerationConfig:
    """A variant's generation configuration, without what the engine does by itself.

    Args:
        model: its own or the shared one, whose configuration holds where the folder has none.
        folder: with `generation_config.json`, or without.
    """
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        config = copy.deepcopy(model.generation_config)
    start = config.decoder_start_token_id
    if start is None and model.config.is_encoder_decoder:
        start = getattr(model.config, "decoder_start_token_id", None)
        text = model.config.get_text_config(decoder=True)
        found = (start, getattr(text, "decoder_start_token_id", None), config.bos_token_id)
        config.decoder_start_token_id = next((s for s in found if s is not None), None)
    pad = config.pad_token_id
    config.pad_token_id = pad if isinstance(pad, int) and pad >= 0 else 0
    for name, value in _OWN.items():
        setattr(config, name, value)
    return config


class Batches:
    """Requests in line, and the batch that is being written. Used by the engine's thread alone.

    Attributes:
        waiting: in order of arrival.
        running: of the batch that is being written.
    """

    def __init__(self, model: Any, host: DeltaHost, rows: int, delivery: Delivery) -> None:
        """`rows` is the most of one batch."""
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._model, self._host, self._rows = model, host, rows
        self._delivery = delivery
        self._vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting)

    def step(self, closing: Callable[[], bool]) -> None:
        """Write one batch from its first to its last token; less where `closing` says so."""
        for job in [j for j in self.waiting if j.cancelled]:
            self.waiting.remove(job)
            self._delivery.end(job, "cancelled")
        jobs = self._pick()
        if not jobs:
            return
        self.running = jobs
        try:
            self._write(jobs, closing)
        except Exception as error:
            self._delivery.fail([j for j in jobs if not j.ended], error)
        finally:
            self.running = []
        for job in jobs:
            if not job.ended:
                self._delivery.end(job, "cancelled")

    def end_all(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End every request, whatever its state."""
        left, self.waiting = [*self.running, *self.waiting], deque()
        for job in left:
            if not job.ended:
                self._delivery.end(job, reason, error)

    def _pick(self) -> list[Job]:
        """The one that came first, and those that fit to it."""
        if not self.waiting:
            return []
        first = _writing(self.waiting[0]).kind
        fitting = (j for j in self.waiting if _writing(j).kind == first)
        jobs = [job for job, _ in zip(fitting, range(self._rows), strict=False)]
        chosen = set(map(id, jobs))
        self.waiting = deque(j for j in self.waiting if id(j) not in chosen)
        return jobs

    @torch.inference_mode()
    def _write(self, jobs: list[Job], closing: Callable[[], bool]) -> None:
        first = _writing(jobs[0])
        model = self._model if first.model is None else first.model
        config = copy.deepcopy(first.config)
        config.max_new_tokens = max(1, *(j.limit for j in jobs))
        inputs = join(
            [_writing(j).brought for j in jobs],
            pad=config.pad_token_id,
            on_the_left=not model.config.is_encoder_decoder,
        )
        self._delivery.counters.prompt_tokens += sum(len(j.ticket.prompt_ids) for j in jobs)
        rows = [j.row for j in jobs]
        batch = self._host.batch(rows) if first.model is None else nullcontext()
        chooser = _Chooser(jobs, self._delivery, self._vocabulary, closing)
        with batch, _without_defaults(model):
            GenerationMixin.generate(
                model,
                **{n: _placed(v, model) for n, v in inputs.items()},
                generation_config=config,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([_Stopper(jobs)]),
            )


class _Chooser(LogitsProcessor):  # type: ignore[misc]
    """Chooses each row's next token by its own settings, and leaves `generate` no other choice."""

    def __init__(
        self,
        jobs: Sequence[Job],
        delivery: Delivery,
        vocabulary: int,
        closing: Callable[[], bool],
    ) -> None:
        self._jobs, self._delivery, self._vocabulary = jobs, delivery, vocabulary
        self._closing = closing

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[rows, vocabulary]` in which every row has one token left."""
        for job in self._jobs:
            if not job.ended and (job.cancelled or self._closing()):
                self._delivery.end(job, "cancelled")
        going = [i for i, job in enumerate(self._jobs) if not job.ended]
        forced = torch.full_like(scores, float("-inf"))
        # Rows that are through go on with anything; nobody looks at them.
        forced[:, 0] = 0
        if going:
            jobs = [self._jobs[i] for i in going]
            counters = self._delivery.counters
            counters.steps += 1
            counters.base_only_steps += all(job.variant is None for job in jobs)
            masked = self._masked(scores[going], jobs)
            choices = choose(masked, [j.sampling for j in jobs], [j.random for j in jobs])
            for i, job, choice in zip(going, jobs, choices, strict=True):
                if self._delivery.deliver(job, choice):
                    forced[i, 0] = float("-inf")
                    forced[i, choice.token] = 0
        return forced

    def _masked(self, scores: torch.Tensor, jobs: Sequence[Job]) -> torch.Tensor:
        """Without the token ids that a row's variant lacks."""
        known = [job.front.vocabulary or self._vocabulary for job in jobs]
        limit = torch.tensor(known, device=scores.device).unsqueeze(1)
        places = torch.arange(scores.shape[-1], device=scores.device)
        return scores.masked_fill(places >= limit, float("-inf"))


class _Stopper(StoppingCriteria):  # type: ignore[misc]
    """Says which rows are through."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """bool `[rows]`."""
        return torch.tensor([job.ended for job in self._jobs], device=input_ids.device)


def _writing(job: Job) -> Writing:
    assert isinstance(job.writing, Writing)
    return job.writing


def _placed(value: torch.Tensor, model: Any) -> torch.Tensor:
    """An input on the model's device; real numbers in its dtype."""
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Within it, a model adds no settings of its own to those that `generate` is given."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
