"""The engine for models that do not generate: labels and vectors, texts and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.compress.fingerprint import digest_source
from deltafold.runtime.deltas import Beside, Deltas, Rebuild
from deltafold.runtime.embedded.batcher import Batcher, Task
from deltafold.runtime.embedded.heads import Heads, Trunk
from deltafold.runtime.embedded.intake import Intake, Want
from deltafold.runtime.embedded.opening import load_bare, need_transformers
from deltafold.runtime.embedded.scoring import outputs_of, scores_of
from deltafold.runtime.embedded.trunk import Encoder, trunk_class
from deltafold.runtime.embedded.vectors import (
    POOLINGS,
    Pooling,
    check_dimensions,
    chosen,
    vector_of,
)
from deltafold.runtime.engine import Prompt, Stats, VariantInfo
from deltafold.runtime.idle import dispensable
from deltafold.runtime.pooled import Outputs, PoolRequest, Scores, Vector
from deltafold.runtime.rebuilding import zero_missing
from deltafold.runtime.uses import Answers
from deltafold.runtime.zoo import check_folder


class PoolingEngine:
    """Serves a base that does not generate and its variants in mixed batches.

    The base is opened without its head, as the bare model of its architecture (the trunk), and runs
    once for a batch. A variant's own class, from its configuration, reads its rows; see `heads`. A
    variant for which that would not be right has a dense model of its own, and batches of its own.

    Threads: everything may be called from any thread. Requests that wait at the same time share
    batches; forward passes happen on the engine's thread alone.
    """

    def __init__(
        self,
        encoder: Encoder,
        deltas: Deltas,
        heads: Heads,
        *,
        max_batch: int = 32,
        max_model_len: int | None = None,
        max_batch_tokens: int = 16384,
    ) -> None:
        """Start the engine; see `open`."""
        for name, value in (
            ("max_batch", max_batch),
            ("max_model_len", max_model_len),
            ("max_batch_tokens", max_batch_tokens),
        ):
            if value is not None and value < 1:
                raise DeltafoldError("bad-argument", f"{name} must be 1 or more, not {value}.")
        self.base_name = deltas.base_name
        self._encoder, self._deltas, self._heads = encoder, deltas, heads
        self._max_tokens = min(encoder.max_tokens, max_model_len or encoder.max_tokens)
        self._intake = Intake(encoder, deltas, heads, self._max_tokens)
        self._batcher = Batcher(encoder, deltas, max_batch, max_batch_tokens)

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
        max_batch_tokens: int = 16384,
    ) -> Self:
        """Load a base checkpoint without its head, wrap it, and start an engine.

        Args:
            base: folder or hub id. Decoders work too: they are read, not continued.
            zoo: folder of delta repos; None serves the base alone.
            device: "auto", "cpu", "cuda", "cuda:1", ...
            dtype: None or "auto" for the checkpoint's own (float32 for small models on a CPU).
            served_model_name: what the base answers to besides "base".
            max_deltas: most variants in memory; None keeps all that were used.
            strict: refuse to start while a delta of the zoo is broken or for another base.
            base_quantization: `nf4` or `int8` keeps the base's linear layers in 4 or 8 bits.
            rebuild: "auto" serves a variant that cannot be run on the shared trunk by a dense model
                of its own in memory; "never" refuses it.
            max_batch: most requests in one forward pass.
            max_model_len: most tokens of a text; never more than the model's own.
            max_batch_tokens: most places in one, in rows times the longest text.

        Raises:
            DeltafoldError: `engine-unsupported` for a base that reads neither texts nor pictures;
                whatever is wrong with the base or, with `strict`, a delta.
        """
        need_transformers()
        check_folder(zoo)
        checkpoint = Checkpoint.open(base)
        model, missing = load_bare(
            checkpoint,
            trunk_class(checkpoint.folder),
            device=device,
            dtype=dtype,
            base_quantization=base_quantization,
        )
        lacking = zero_missing(model, missing)
        encoder = Encoder.of(model)
        heads = Heads(checkpoint, _trunk(encoder, lacking))
        beside = Beside(heads.tensors, heads.problem, heads.blueprint)
        deltas = Deltas(
            model,
            checkpoint,
            zoo,
            name=served_model_name or checkpoint.reference.name,
            max_deltas=max_deltas,
            strict=strict,
            rebuild=rebuild,
            digests=digest_source(checkpoint),
            inputs=encoder.inputs,
            beside=beside,
        )
        return cls(
            encoder,
            deltas,
            heads,
            max_batch=max_batch,
            max_model_len=max_model_len,
            max_batch_tokens=max_batch_tokens,
        )

    # Requests.

    def classify(self, requests: Sequence[PoolRequest]) -> list[Scores]:
        """Labels by each variant's own head, in the requests' order.

        Raises:
            DeltafoldError: `variant-not-found`; `bad-argument` for what the model cannot read or
                a variant that does not classify; `context-length`; `busy` after `close`; and every
                code that loading a delta can give.
        """
        return self._all(requests, "answer", scores_of)

    def run(self, requests: Sequence[PoolRequest]) -> list[Outputs]:
        """What each variant's own class returns: scores of every token, of spans, or whatever.

        Raises:
            DeltafoldError: as `classify`, for a variant without a head.
        """
        return self._all(requests, "answer", outputs_of)

    def embed(
        self,
        requests: Sequence[PoolRequest],
        *,
        pooling: Pooling = "auto",
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> list[Vector]:
        """Vectors in the requests' order.

        Args:
            requests: texts or pictures.
            pooling: `mean` of a text's tokens, the first (`cls`) or `last` one's state, the model's
                own `pooler`; see `vectors`.
            normalize: give vectors of length 1.
            dimensions: keep the first ones alone. For models that say they were trained for it
                (`is_matryoshka`, `matryoshka_dimensions` in `config.json`).

        Raises:
            DeltafoldError: as `classify`.
        """
        if pooling not in POOLINGS:
            raise DeltafoldError(
                "bad-argument", f"pooling is one of {', '.join(POOLINGS)}, not {pooling!r}."
            )

        def finish(task: Task, output: Any) -> Vector:
            kind = chosen(pooling, output, task.way, dual=task.asked.dual)
            if kind == "pooler" and task.lacks_pooler:
                raise DeltafoldError(
                    "bad-argument",
                    f"{task.variant} brings no pooler of its own.",
                    fix="ask for pooling cls, mean or last",
                )
            found = vector_of(output, kind)
            if dimensions not in (None, len(found)):
                check_dimensions(dimensions, len(found), self._intake.folder(task.holder))
                found = found[:dimensions].clone()
            if normalize:
                found = torch.nn.functional.normalize(found, dim=0)
            return Vector(*task.origin, vector=found)

        return self._all(requests, "states", finish)

    # Variants and text.

    def variants(self) -> list[VariantInfo]:
        """The base and every variant of the zoo, sorted by name, the base first."""
        return self._deltas.variants()

    def resolve(self, name: str) -> VariantInfo:
        """The variant behind a name; `variant-not-found` names near ones."""
        return self._deltas.resolve(name)

    def encode(self, variant: str, prompt: Prompt) -> list[int]:
        """Token ids by the variant's own tokenizer."""
        ids: list[int] = self._intake.with_front(variant, lambda front: front.encode(prompt))
        return ids

    def decode(self, variant: str, token_ids: Sequence[int]) -> str:
        """Text by the variant's own tokenizer, special tokens left out."""
        text: str = self._intake.with_front(variant, lambda front: front.decode(token_ids))
        return text

    @property
    def pictures(self) -> bool:
        """Whether requests may be pictures."""
        return "image" in self._encoder.ways

    @property
    def max_model_len(self) -> int:
        """Most tokens of a text; 0 where only pictures are read."""
        return self._max_tokens

    def stats(self) -> Stats:
        """A snapshot for metrics; nothing is generated and no keys and values are kept."""
        sizes = Counter(self._deltas.resident())
        sizes.update(self._heads.resident())
        return self._batcher.stats(dict(sizes))

    def close(self) -> None:
        """Finish the running batch, fail what waits with `busy`, give the modules their forwards."""
        self._batcher.close()
        self._deltas.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _all(
        self, requests: Sequence[PoolRequest], want: Want, finish: Callable[[Task, Any], Any]
    ) -> list[Any]:
        tasks: list[Task] = []
        try:
            for request in requests:
                tasks.append(self._intake.task(request, want, finish))
            self._batcher.submit(tasks)
            return [task.future.result() for task in tasks]
        finally:
            # One that failed must not let go of a delta that another one still runs with.
            self._batcher.settle(tasks)
            for task in tasks:
                self._deltas.release(task.holder)


def _trunk(encoder: Encoder, lacking: frozenset[str]) -> Trunk:
    model = encoder.model
    answers = Answers.observe(model, encoder.inputs)
    parameters: dict[int, set[str]] = {}
    for name, value in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        parameters.setdefault(id(value), set()).add(name)
    return Trunk(
        kind=type(model),
        tensors={n: frozenset(names) for names in parameters.values() for n in names},
        lacking=lacking,
        dispensable=dispensable(model, encoder.inputs, answers, answers.places[0]),
        device=encoder.device,
        dtype=encoder.dtype,
        sample=encoder.sample(),
    )
