"""One forward pass of a batch: tokens in, logits out, each row under its own variant."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.cache import BatchCache, CachePlan
from deltafold.runtime.embedded.overlay import Overlay
from deltafold.runtime.host import DeltaHost, Row

#: Used where a configuration does not say how long a context the model knows.
_UNSTATED_CONTEXT: Final = 2048
_CONTEXTS: Final = ("max_position_embeddings", "seq_length")
#: What models call the memory that they are given; the latter where it holds states alone.
_CACHES: Final = ("past_key_values", "cache_params")


def stated_context(config: Any, names: Sequence[str]) -> int | None:
    """The first context length that a configuration states under one of some names, in tokens."""
    found = (getattr(config, name, None) for name in names)
    return next((int(length) for length in found if length), None)


def cache_argument(cls: type) -> str:
    """What a class calls the memory that its forward is given; empty where it takes none."""
    known = inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    return next((name for name in _CACHES if name in known), "")


class Runner:
    """Calls a causal language model of transformers through its public arguments alone.

    Base rows are left untouched: their logits are what the plain model gives for a batch of the
    same shape.

    Attributes:
        vocabulary: token ids that the base knows, and the width of its logits.
        device: where tokens go in.
        embedding_width: size of an input embedding; None where the model takes none from outside.
    """

    def __init__(self, model: Any, host: DeltaHost | None) -> None:
        """A runner of the shared model, or without a host of one variant's own dense model.

        Raises:
            DeltafoldError: `engine-unsupported` where a model cannot continue from a cache.
        """
        known = set(inspect.signature(type(model).forward).parameters)
        self._takes_cache = cache_argument(type(model))
        if not self._takes_cache:
            raise DeltafoldError(
                "engine-unsupported",
                f"{type(model).__name__} takes no key-value cache, so it cannot generate here.",
                fix="serve it for labels and vectors: --runner pooling",
            )
        self._model = model.eval()
        self._host = host
        self._takes_positions = "position_ids" in known
        self._takes_keep = "logits_to_keep" in known
        self._plan = CachePlan(model)
        self.embedding_width = _embedding_width(model, known)
        # Asked of the configuration, since a host may have put its own modules into the model.
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.device: torch.device = model.device

    @property
    def context(self) -> int:
        """The longest sequence that the model's configuration allows, in tokens."""
        return stated_context(self._model.config.get_text_config(), _CONTEXTS) or _UNSTATED_CONTEXT

    def new_cache(self, columns: int) -> BatchCache:
        """An empty cache with room for this many columns."""
        return self._plan.new(columns)

    @property
    def recurrent(self) -> bool:
        """Whether prompts must be read whole and without padding.

        Not every model with recurrent layers goes on from a state with several tokens at once, or
        keeps padding out of its state, and none says so.
        """
        return self._plan.recurrent

    def __call__(
        self,
        cache: BatchCache,
        rows: Sequence[Row],
        tokens: Sequence[Sequence[int]],
        padding: Sequence[int],
        *,
        every_position: bool = False,
        overlays: Sequence[Overlay | None] | None = None,
    ) -> torch.Tensor:
        """Append a rectangle of tokens to the cache and run it.

        Args:
            cache: the memory of exactly these rows; grows by the rectangle's width.
            rows: the variant of each row.
            tokens: `[rows][width]`; any valid id stands where there is padding.
            padding: hidden columns on each row's left, counted over the whole cache.
            every_position: give logits for all new positions, not only for the last.
            overlays: a row each, input embeddings in place of some tokens; None where there are none.

        Returns:
            Logits in the model's dtype on the model's device, `[rows, width or 1, vocabulary]`.
        """
        past, width = cache.columns, len(tokens[0])
        # One transfer for all that the host decided.
        table = torch.tensor(
            [[pad, *ids] for pad, ids in zip(padding, tokens, strict=True)], dtype=torch.long
        ).to(self.device, non_blocking=True)
        hidden, ids = table[:, :1], table[:, 1:]
        columns = torch.arange(past + width, device=self.device)
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": (columns >= hidden).long(),
            self._takes_cache: cache,
            "use_cache": True,
        }
        if self._takes_positions:
            inputs["position_ids"] = (columns[past:] - hidden).clamp_(min=0)
        if self._takes_keep:
            inputs["logits_to_keep"] = 0 if every_position else 1
        with self._host.batch(rows) if self._host else nullcontext():
            if overlays is not None:
                inputs["inputs_embeds"] = self._embedded(inputs.pop("input_ids"), overlays)
            logits: torch.Tensor = self._model(**inputs).logits
        return logits if every_position else logits[:, -1:]

    def _embedded(self, ids: torch.Tensor, overlays: Sequence[Overlay | None]) -> torch.Tensor:
        """Input embeddings `[rows, width, hidden]`: each row's own, but for what is given."""
        embedded: torch.Tensor = self._model.get_input_embeddings()(ids).clone()
        for row, overlay in enumerate(overlays):
            if overlay is not None:
                # Left of the rectangle there may be padding, or columns of an earlier pass.
                places = overlay.positions.to(self.device)
                embedded[row, places] = overlay.values.to(self.device, embedded.dtype)
        return embedded


def _embedding_width(model: Any, known: set[str]) -> int | None:
    # Models that look tokens up in more than one table cannot do without their ids.
    if "inputs_embeds" not in known or "per_layer_inputs" in known:
        return None
    table = model.get_input_embeddings()
    return int(table.embedding_dim) if isinstance(table, torch.nn.Embedding) else None
