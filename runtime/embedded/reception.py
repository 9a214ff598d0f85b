"""From a request for text to a job: its variant held, its prompt read, its output bounded."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

from deltafold.runtime.embedded.checks import (
    check_overlay,
    check_prompt,
    check_sampling,
    check_scale,
    check_whole,
    output_limit,
)
from deltafold.runtime.embedded.drafts import Drafts
from deltafold.runtime.embedded.inputs import is_plain
from deltafold.runtime.embedded.job import Job
from deltafold.runtime.embedded.overlay import Overlay, read_prompt
from deltafold.runtime.embedded.runner import Runner
from deltafold.runtime.embedded.scheduler import Limits
from deltafold.runtime.embedded.text import TextFront, TextFronts
from deltafold.runtime.engine import OnChunk, Request, Ticket, VariantInfo
from deltafold.runtime.host import DeltaHost, Variant
from deltafold.runtime.mixtures import variant_name


class Reception:
    """Reads requests by each variant's own tokenizer and chat template. Thread-safe.

    Args:
        model: the shared one.
        host: of its variants.
        runner: of the model; None where it writes in whole batches alone.
        limits: of every request.
    """

    def __init__(self, model: Any, host: DeltaHost, runner: Runner | None, limits: Limits) -> None:
        self._host, self._limits = host, limits
        self._by_token = runner is not None
        self._base_vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
        self._embedding_width = None if runner is None else runner.embedding_width
        self._fronts = TextFronts(host.base_name, host.base_folder)
        self._drafts = Drafts(model, host.base_folder)
        self._numbers = itertools.count()

    def job(self, request: Request, on_chunk: OnChunk) -> Job:
        """A request that holds its variant and waits to be put in line; whoever ends it lets go.

        Raises:
            DeltafoldError: see `EmbeddedEngine.submit`.
        """
        check_sampling(request.sampling)
        name = variant_name(request.variant)
        info = self._host.resolve(name)
        variant = self._host.acquire(name)
        try:
            return self._accept(request, on_chunk, info, variant)
        except BaseException:
            self._host.release(variant)
            raise

    def front(self, name: str) -> TextFront:
        """The text side of what is served under a name."""
        front = self._fronts.known(self._host.resolve(name).digest)
        if front is not None:
            return front
        # Only a loaded variant tells its folder; after this once the front is kept.
        variant = self._host.acquire(name)
        try:
            return self._front_of(variant)
        finally:
            self._host.release(variant)

    def _front_of(self, variant: Variant | None) -> TextFront:
        if variant is None:
            return self._fronts.base()
        return self._fronts.get(variant.digest, variant.name, variant.folder)

    def _accept(
        self, request: Request, on_chunk: OnChunk, info: VariantInfo, variant: Variant | None
    ) -> Job:
        front, sampling = self._front_of(variant), request.sampling
        own = None if variant is None else variant.model
        if own is not None:
            check_scale(sampling, info)
        writing, runner, room = None, None, self._limits.model_len
        overlay: Overlay | None = None
        if self._by_token and is_plain(request.prompt):
            ids, overlay = read_prompt(front, request.prompt, self._embedding_width)
            check_overlay(overlay is not None, sampling)
            runner = None if own is None else Runner(own, None)
            room = room if runner is None else min(room, runner.context)
            limit = output_limit(len(ids), sampling.max_tokens, room)
        else:
            check_whole(sampling)
            writing = self._drafts.make(request.prompt, front, variant)
            ids = list(writing.brought.ids)
            limit = self._drafts.limit(writing, sampling.max_tokens, room)
        check_prompt(ids, front.vocabulary or self._base_vocabulary)
        digest = info.digest if variant is None else variant.digest
        return Job(
            ticket=Ticket(uuid.uuid4().hex, info.name, digest, tuple(ids)),
            sampling=sampling,
            variant=variant,
            front=front,
            on_chunk=on_chunk,
            order=next(self._numbers),
            limit=limit,
            runner=runner,
            writing=writing,
            overlay=overlay,
        )
