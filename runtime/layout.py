"""How a module's arguments and outputs lay out the batch, as a warm-up pass saw it.

Sizes of the warm-up batch are odd ones, so that a first dimension tells what it counts: requests
(`rows`), requests times tokens (`tokens`) or times something else (`parts`: windows of images, say), or
nothing (`one`: the same for every request).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import torch

#: A warm-up batch whose sizes are unlikely to be a model's own: 5 requests of 3 tokens.
WARM_ROWS: Final = 5
WARM_TOKENS: Final = 3

#: `whole` is handed on as it is; `other` is a tensor without the batch in front; `cache` is a
#: cache of transformers, `state` any other object that may remember calls.
Kind: TypeAlias = Literal["rows", "tokens", "parts", "one", "whole", "other", "cache", "state"]
#: The kind of a value, or of every member of a tuple, a list or a mapping.
Tree: TypeAlias = "Kind | tuple[Tree, ...]"

_BATCHED = ("rows", "tokens", "parts", "one")
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def kind_of(value: Any) -> Tree:
    """The kind of a value of the warm-up pass."""
    if isinstance(value, torch.Tensor):
        if not value.dim():
            return "whole"
        first = value.shape[0]
        kinds: dict[int, Kind] = {1: "one", WARM_ROWS: "rows", WARM_ROWS * WARM_TOKENS: "tokens"}
        return kinds.get(first, "parts" if first and first % WARM_ROWS == 0 else "other")
    if isinstance(value, tuple | list):
        return tuple(kind_of(v) for v in value)
    if isinstance(value, Mapping):
        return tuple(kind_of(v) for v in value.values())
    if is_cache(value):
        return "cache"
    return "whole" if isinstance(value, _PLAIN) else "state"


def is_cache(value: Any) -> bool:
    """Whether an argument is a cache of keys and values, or stands in for one."""
    # By name: the hooks serve models without asking for transformers.
    names = {c.__name__ for c in type(value).__mro__}
    return "Cache" in names or getattr(type(value), "deltafold_cache", False) is True


def answers_of(output: Any, place: str = "") -> dict[str, torch.Tensor]:
    """What a warm-up pass says about each request, by its place in the output: every tensor of
    real numbers that has requests in front.
    """
    if isinstance(output, torch.Tensor):
        told = output.is_floating_point() and output.dim() > 0 and len(output) == WARM_ROWS
        return {place: output} if told else {}
    found: dict[str, torch.Tensor] = {}
    if isinstance(output, Mapping | tuple | list):
        named = output.items() if isinstance(output, Mapping) else enumerate(output)
        for key, value in named:
            found |= answers_of(value, f"{place}.{key}")
    return found


def leaves(tree: Tree) -> list[Kind]:
    """All kinds in a tree."""
    return [k for t in tree for k in leaves(t)] if isinstance(tree, tuple) else [tree]


@dataclass(frozen=True)
class Layout:
    """The kinds of one module's arguments and output.

    Attributes:
        args: of the positional arguments.
        kwargs: of the keyword arguments, sorted by name.
        output: of what it returns.
    """

    args: tuple[Tree, ...]
    kwargs: tuple[tuple[str, Tree], ...]
    output: Tree

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Layout:
        """The layout of a call of the warm-up pass."""
        named = tuple((k, kind_of(v)) for k, v in sorted(kwargs.items()))
        return cls(tuple(kind_of(a) for a in args), named, kind_of(output))

    @property
    def inputs(self) -> list[Kind]:
        """Kinds of all arguments."""
        return leaves((*self.args, *(kind for _, kind in self.kwargs)))

    @property
    def keeps_batch(self) -> bool:
        """Whether every tensor that it returns has requests in front."""
        out = leaves(self.output)
        return all(k in (*_BATCHED, "whole") for k in out) and any(k in _BATCHED for k in out)

    @property
    def repeatable(self) -> bool:
        """Whether it can be run once more for some requests alone."""
        return self.keeps_batch and "state" not in self.inputs

    @property
    def cached(self) -> bool:
        """Whether it is given a cache."""
        return "cache" in self.inputs

    @property
    def guessed(self) -> bool:
        """Whether a tensor's first dimension is taken for requests since it is a multiple of them."""
        return "parts" in self.inputs or "parts" in leaves(self.output)

    @property
    def shared(self) -> bool:
        """Whether its output is one for all requests, as position embeddings may be."""
        return "one" in leaves(self.output)

    def kwarg(self, name: str) -> Tree | None:
        """The kind of a keyword argument; None where the warm-up pass gave none."""
        return dict(self.kwargs).get(name)
