"""The contract of a method: what users choose by name, e.g. `bitdelta:bits=4,group=128`.

A method is a frozen dataclass whose fields are its options. It turns one tensor's delta into a sum of
terms. It declares what it needs beyond the two checkpoints, where it comes from, and how its terms
are applied, so that `deltafold codecs` can print one honest table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, Protocol, Self, runtime_checkable

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.fast import Pair
from deltafold.compress.spec import Kind, spec_of, split_outside
from deltafold.compress.terms import Context, Encoded, Term

__all__ = [
    "METHODS",
    "Method",
    "PairMethod",
    "SurveyedMethod",
    "bits_per_weight",
    "build",
    "method",
    "method_class",
    "parse_spec",
    "spec_of",
]


@runtime_checkable
class Method(Protocol):
    """A way to store a tensor's delta.

    One that codes each row of a matrix without looking at others may say so with `blockwise = True`:
    large tensors then go through it in blocks of rows, and never lie in memory as a whole. One that
    takes much memory says how much with `entry_bytes`, at an entry (see `compress/limits.py`). One
    whose cost is arithmetic says `on_device = True`: it may be given tensors on any one device, makes
    none elsewhere, and adds up in a fixed order (see `compress/placing.py`).
    """

    id: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    applied: ClassVar[str]

    @property
    def needs(self) -> tuple[Need, ...]:
        """What `context.evidence` must hold; empty for most."""
        ...

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """Terms whose sum represents a float32 delta."""
        ...

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """The terms for a tensor of `shape` and safetensors `dtype`, before any data is read."""
        ...


@runtime_checkable
class SurveyedMethod(Method, Protocol):
    """A method that looks at every tensor that it will store before it stores the first."""

    def survey(self, tensors: Iterable[tuple[torch.Tensor, Context]]) -> Self:
        """The method with what it needs to know of the whole model filled in.

        `tensors` has float32 deltas as edits leave them, each with its context: the name, and where the
        run has reference checkpoints the base's tensor and theirs. It can be gone through several
        times; each time the model is read anew. What is filled in is no part of the spec.
        """
        ...


@runtime_checkable
class PairMethod(Method, Protocol):
    """A method that is quicker where it sees both models than where it is given their difference."""

    def encode_pair(self, pair: Pair, context: Context) -> list[Encoded]:
        """What `encode` gives for `pair.delta()`, bit for bit, where the method is `blockwise`."""
        ...


METHODS: Final[dict[str, type[Any]]] = {}
_CODECS: Final = Kind("codec", METHODS, "deltafold.methods", "--codec")
#: Between the edits and the codec of a chain; a plus in a number (1e+5) is followed by a digit.
_LINK: Final = r"\+(?=\s*[a-z])"


def method(cls: type[Any]) -> type[Any]:
    """Class decorator: make a method known under its id; a duplicate is an error."""
    assert cls.id not in METHODS, f"two methods share the id {cls.id!r}"
    METHODS[cls.id] = cls
    return cls


def method_class(name: str) -> type[Any]:
    """The method behind a name. Raises `unknown-codec`, naming those that exist."""
    return _CODECS.find(name)


def parse_spec(spec: str) -> Method:
    """`dare:drop=0.9,seed=1`, or edits before a codec, `trim:keep=0.2+int:bits=4`, as a method.

    Raises:
        DeltafoldError: `unknown-codec`, or `bad-recipe` naming the option that is wrong.
    """
    *edits, codec = split_outside(spec, _LINK)
    built: Method = _CODECS.parse(codec)
    if edits:
        from deltafold.compress.edits import parse_edit
        from deltafold.compress.methods.chain import Chain

        built = Chain(tuple(parse_edit(e) for e in edits), built)
    return built


def bits_per_weight(chosen: Method, shape: tuple[int, ...], dtype: str) -> float:
    """Stored bits a weight of a tensor of `shape`, all parts counted, by the method's plan.

    Where the size depends on the data (a mask, a compressed stream) it is what the plan expects.
    """
    promised = sum(s.nbytes for t in chosen.plan(shape, dtype) for s in t.parts(shape).values())
    return 8 * promised / max(math.prod(shape), 1)


def build(name: str, options: Mapping[str, Any], *, where: str) -> Method:
    """A method from its name and options, values converted to the fields' types."""
    built: Method = _CODECS.build(name, options, where=where)
    return built
