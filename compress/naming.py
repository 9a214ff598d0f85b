"""A base whose tensors have other names in the fine-tune: a prefix before them, or one less.

A bare model is saved as `layers.0...`, the same model with a head as `model.layers.0...`. Which prefix
it is, and that it is one, is told by names and shapes alone. A fine-tune may also bring a tensor that
the base has under another name only: a head that was tied to the table of tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeAlias, TypeVar

import torch

from deltafold.compress.checkpoint import Checkpoint, Spec, TensorSource
from deltafold.compress.companions import vocabulary
from deltafold.compress.manifest import BaseNames
from deltafold.compress.safetensors_file import Hash

Value = TypeVar("Value")
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


class NamedBase:
    """A base checkpoint under the names that a fine-tune gives its tensors.

    What relates the two goes by the fine-tune's names alone. The base's identity stays that of the
    checkpoint, whose tensors have their own names.

    Args:
        checkpoint: the base.
        scheme: how its names are changed; None leaves them.
        untied: tensors of the fine-tune's that are one with another in the base, and that other, both
            by the fine-tune's names.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: BaseNames | None = None,
        untied: Mapping[str, str] | None = None,
    ) -> None:
        self.checkpoint, self.scheme, self.untied = checkpoint, scheme, dict(untied or {})
        self.reference, self.folder = checkpoint.reference, checkpoint.folder

    @classmethod
    def of(cls, checkpoint: Checkpoint, variant: TensorSource) -> NamedBase:
        """The base under the names of a fine-tune."""
        plain = cls(checkpoint, base_names(checkpoint, variant))
        return cls(checkpoint, plain.scheme, untied_tables(plain, variant))

    def own(self, name: str) -> str | None:
        """The base's own name of a tensor; None where it has none such."""
        name = self.untied.get(name, name)
        return next((n for n in own_names(self.scheme, name) if n in self.checkpoint), None)

    def likely(self, name: str) -> list[str]:
        """The base's own name of a tensor; where it has none such, the names that it would have."""
        own = None if name in self.untied else self.own(name)
        return [own] if own is not None else [*own_names(self.scheme, name), name]

    def names(self) -> list[str]:
        """Sorted tensor names."""
        own = (renamed(self.scheme, name) for name in self.checkpoint.names())
        return sorted([*own, *self.untied])

    def __contains__(self, name: str) -> bool:
        return self.own(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def spec(self, name: str) -> Spec:
        """Dtype and shape, without reading the tensor."""
        return self.checkpoint.spec(self._known(name))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype, in memory of its own."""
        return self.checkpoint.tensor(self._known(name))

    def matrix_rows(
        self,
        name: str,
        start: int,
        stop: int,
        out: torch.Tensor | None = None,
        total: Hash | None = None,
    ) -> torch.Tensor:
        """Rows of a tensor read as a matrix, `[stop - start, M]`; see `SafetensorsFile`."""
        return self.checkpoint.matrix_rows(self._known(name), start, stop, out, total)

    def sha256(self, name: str) -> str:
        """Hex digest of the tensor's bytes."""
        return self.checkpoint.sha256(self._known(name))

    def named(self, by_own: Mapping[str, Value]) -> dict[str, Value]:
        """What is known by the base's own names, by the fine-tune's."""
        found = {renamed(self.scheme, name): value for name, value in by_own.items()}
        return found | {n: found[tied] for n, tied in self.untied.items() if tied in found}

    def by_own(self, named: Mapping[str, Value]) -> dict[str, Value]:
        """What is known by the fine-tune's names, by the base's own."""
        return {self._known(name): value for name, value in named.items()}

    def _known(self, name: str) -> str:
        own = self.own(name)
        if own is None:
            raise KeyError(name)
        return own


def renamed(scheme: BaseNames | None, own: str) -> str:
    """The fine-tune's name of a tensor that the base calls `own`."""
    if scheme is None:
        return own
    return scheme.prefix + own if scheme.change == "add" else own.removeprefix(scheme.prefix)


def own_names(scheme: BaseNames | None, name: str) -> list[str]:
    """What the base may call a tensor of the fine-tune's, likeliest first; empty for nothing."""
    if scheme is None:
        return [name]
    inside = name.startswith(scheme.prefix)
    if scheme.change == "add":
        return [name.removeprefix(scheme.prefix)] if inside else []
    return [scheme.prefix + name, *([] if inside else [name])]


def untied_tables(base: NamedBase, variant: TensorSource) -> dict[str, str]:
    """A table of tokens that the fine-tune has twice and the base once, both by the fine-tune's names.

    It is found by what the configurations say of ties, and by shapes: a matrix that the base lacks is
    as wide as the one table with a row for each word, and has as many rows as the fine-tune's own
    table. No more than one is taken: heads of other kinds may look the same.
    """
    words, tied = vocabulary(base.folder)
    _, still = vocabulary(variant.reference.folder)
    if words is None or tied is False or still is True or (tied is None and still is None):
        return {}
    names = set(variant.names())
    tables = [n for n in base.names() if len(s := base.spec(n).shape) == 2 and s[0] >= words]
    if len(tables) != 1 or tables[0] not in names:
        return {}
    shape = variant.spec(tables[0]).shape
    new = [n for n in names if n not in base and variant.spec(n).shape == shape]
    return (
        {new[0]: tables[0]} if len(new) == 1 and shape[1:] == base.spec(tables[0]).shape[1:] else {}
    )


def base_names(base: TensorSource, variant: TensorSource) -> BaseNames | None:
    """The prefix that a fine-tune adds to its base's names or drops from them; None for no such.

    It is found where one prefix alone gives half of the base's tensors or more a partner of the same
    shape, and no tensor that it renames has one under its own name. Prefixes end in a dot.
    """
    ours = {name: base.spec(name).shape for name in base.names()}
    theirs = {name: variant.spec(name).shape for name in variant.names()}
    half = len(ours) / 2
    enough = [
        *(BaseNames(change="add", prefix=p) for p in _bridging(theirs, ours, half)),
        *(BaseNames(change="remove", prefix=p) for p in _bridging(ours, theirs, half)),
    ]
    if len(enough) != 1:
        return None
    (scheme,) = enough
    moved = {name: renamed(scheme, name) for name in ours}
    kept = any(new != name and theirs.get(name) == ours[name] for name, new in moved.items())
    return None if kept or len(set(moved.values())) < len(moved) else scheme


def _bridging(longer: Shapes, shorter: Shapes, least: float) -> list[str]:
    """Prefixes that at least so many of the longer names have before a shorter one of their shape."""
    counts = Counter(
        prefix
        for name, shape in longer.items()
        for prefix in prefixes(name)
        if shorter.get(name[len(prefix) :]) == shape
    )
    return [prefix for prefix, count in counts.items() if count >= least]


def prefixes(name: str) -> Iterator[str]:
    """`a.`, `a.b.` and so on of `a.b.c`."""
    dot = name.find(".")
    while 0 <= dot < len(name) - 1:
        yield name[: dot + 1]
        dot = name.find(".", dot + 1)
