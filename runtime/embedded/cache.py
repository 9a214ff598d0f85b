"""What a running batch remembers of its tokens: one layer object per layer of the model.

Attention layers use `KVLayer`. Layers of linear attention, short convolutions and their kin keep
one state of fixed size per row, in transformers' own class; joining and leaving are then a
concatenation and a selection along the rows.
"""

from __future__ import annotations

import copy
import inspect
import typing
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import transformers.cache_utils as hf
from transformers.cache_utils import Cache

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.layer import KVLayer

# Absent in the first 5.x releases, where models with such layers bring a cache class of their own.
_STATE_LAYER: type | None = getattr(hf, "LinearAttentionLayer", None)
_EMPTY_LAYER: type | None = getattr(hf, "DummyLayer", None)


class BatchCache(Cache):  # type: ignore[misc]
    """The memory of one batch, right-aligned (see `layer`); every change keeps layers in step."""

    def __init__(self, layers: list[Any]) -> None:
        """Without `layers`, attention layers are added as the model asks for them."""
        if layers:
            super().__init__(layers=layers)
        else:
            super().__init__(layer_class_to_replicate=KVLayer)

    @property
    def columns(self) -> int:
        """Columns of the batch: the longest row's tokens."""
        return next((layer.columns for layer in self._attention()), 0)

    @property
    def capacity(self) -> tuple[int, int]:
        """Rows and columns that memory is allocated for."""
        return next((layer.capacity for layer in self._attention()), (0, 0))

    def join(self, other: BatchCache) -> None:
        """Add another batch's rows below this one's."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, KVLayer):
                if mine.is_initialized:
                    mine.join(theirs)
            else:
                for name, states in _states(mine):
                    setattr(mine, name, _below(states, getattr(theirs, name)))
        for name, values in _lists(self):
            setattr(self, name, list(map(_joined, values, getattr(other, name))))

    def drop(self, gone: Iterable[int], rows: int) -> list[int]:
        """Forget rows of a batch of `rows`; the last ones move into the gaps.

        Returns:
            The old index of every row that is left, in the new order.
        """
        moves, order = _fill_gaps(set(gone), rows)
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                if layer.is_initialized:
                    layer.keep(moves, len(order))
            else:
                for name, states in _states(layer):
                    setattr(layer, name, {i: _select(s, order) for i, s in states.items()})
        for name, values in _lists(self):
            rows_of = [_select(v, order) if isinstance(v, torch.Tensor) else v for v in values]
            setattr(self, name, rows_of)
        return order

    def trim(self, columns: int) -> None:
        """Forget columns on the left that are padding in every row."""
        for layer in self._attention():
            layer.trim(columns)

    def _attention(self) -> list[KVLayer]:
        return [x for x in self.layers if isinstance(x, KVLayer) and x.is_initialized]


def _lists(cache: Cache) -> list[tuple[str, list[Any]]]:
    """What a model's own cache class keeps for each row besides the layers: lists of tensors."""
    return [
        (name, value)
        for name, value in vars(cache).items()
        if name != "layers" and isinstance(value, list)
    ]


def _joined(upper: Any, lower: Any) -> Any:
    return torch.cat([upper, lower]) if isinstance(upper, torch.Tensor) else upper


_States: TypeAlias = dict[int, torch.Tensor | None]


def _states(layer: Any) -> list[tuple[str, _States]]:
    """A layer's per-row states by attribute; empty for layers that remember nothing."""
    names = ("conv_states", "recurrent_states")
    return [(name, getattr(layer, name)) for name in names if hasattr(layer, name)]


def _below(upper: _States, lower: _States) -> _States:
    joined: _States = {}
    for i, state in upper.items():
        other = lower[i]
        joined[i] = None if state is None or other is None else torch.cat([state, other])
    return joined


def _select(state: torch.Tensor | None, rows: Sequence[int]) -> torch.Tensor | None:
    return None if state is None else state[list(rows)]


def _fill_gaps(gone: set[int], rows: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Moves `(from, to)` that close the gaps, and the rows' old indices afterwards."""
    left = rows - len(gone)
    gaps = sorted(i for i in gone if i < left)
    moves = list(zip((i for i in range(left, rows) if i not in gone), gaps, strict=True))
    order = list(range(left))
    for source, target in moves:
        order[target] = source
    return moves, order


class CachePlan:
    """How to make a model's caches, from its configuration.

    Attributes:
        recurrent: some layers keep a state instead of keys and values.
    """

    def __init__(self, model: Any) -> None:
        """Raises `engine-unsupported` for layers that remember in a way not known here."""
        self._kind = _own_class(model)
        # transformers' own table of layer types decides, so new families need no list of ours.
        self._templates = list(hf.DynamicCache(config=model.config).layers)
        for i, layer in enumerate(self._templates):
            if not (_is_attention(layer) or type(layer) in (_STATE_LAYER, _EMPTY_LAYER)):
                raise _unsupported(f"layer {i} keeps a {type(layer).__name__}")
        states = any(type(layer) is _STATE_LAYER for layer in self._templates)
        self.recurrent = states or self._kind is not None
        if _STATE_LAYER is None and _keeps_states(model):
            raise _unsupported("this release of transformers is too old for its recurrent layers")

    def new(self, columns: int) -> BatchCache:
        """An empty cache with room for this many columns."""
        if self._kind is not None:
            made: BatchCache = self._kind()
            made.layer_class_to_replicate = partial(KVLayer, columns)
            return made
        layers = [
            KVLayer(columns) if _is_attention(layer) else copy.deepcopy(layer)
            for layer in self._templates
        ]
        return BatchCache(layers)


def _own_class(model: Any) -> type | None:
    """A class for models that accept no cache but one of a class of their own: it is one, too."""
    body = inspect.signature(type(model.base_model).forward).parameters
    named = getattr(body.get("past_key_values"), "annotation", None)
    for kind in (named, *typing.get_args(named)):
        if isinstance(kind, type) and issubclass(kind, Cache) and kind.__module__ != hf.__name__:
            begin = kind.__dict__["__init__"]
            return type(f"Batch{kind.__name__}", (BatchCache, kind), {"__init__": begin})
    return None


def _keeps_states(model: Any) -> bool:
    """Whether a model has recurrent layers, for releases whose cache does not tell."""
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    recurrent = types & {"linear_attention", "conv", "mamba"}
    return bool(recurrent) or getattr(model, "_is_stateful", False)


def _is_attention(layer: Any) -> bool:
    return type(layer) in (hf.DynamicLayer, hf.DynamicSlidingWindowLayer)


def _unsupported(why: str) -> DeltafoldError:
    return DeltafoldError(
        "engine-unsupported",
        f"the embedded engine cannot batch this model: {why}.",
        fix="serve it with the vllm engine, or update transformers",
    )
