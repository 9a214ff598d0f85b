"""`shift-scale`: a compressed vector moves the base, what is left is compressed beside it.

After "Dynamic Base Model Shift for Delta Compression" (DBMS, arXiv 2505.11344): before a delta is
compressed the base is shifted towards the task along a vector that is itself compressed; two scalars a
task say how far, and how large the compressed rest is. What is stored is

    D^ = shift * B + scale * C(D - shift * B),   B the vector as it is stored, C the other codec.

How the paper makes its vector, and how it learns the scalars, is not public in a form that could be
followed, hence the name. Here B is the delta itself in a codec of few bits; `--fit-terms` learns the
two scalars of the whole model on logits, without data both are 1. Several fine-tunes share one B in the
family of the same name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import NEEDS, Need
from deltafold.compress.methods.base import Method, method, parse_spec, spec_of
from deltafold.compress.methods.chain import looks_around
from deltafold.compress.terms import Context, Encoded, Term, is_exact, scaled


@method
@dataclass(frozen=True)
class ShiftScale:
    """Two codecs, the second for what the first leaves, each with a factor.

    Attributes:
        vector: codec of the vector that shifts the base.
        rest: codec of what is left.
        shift: factor of the vector, not 0.
        scale: factor of the rest, not 0.
    """

    id: ClassVar[str] = "shift-scale"
    summary: ClassVar[str] = "a compressed shift of the base, and the rest in another codec"
    paper: ClassVar[str] = "after 2505.11344"
    applied: ClassVar[str] = "as its two codecs"

    vector: str = "svd:bits=0.25"
    rest: str = "bitdelta"
    shift: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(f) and f != 0 for f in (self.shift, self.scale)):
            raise DeltafoldError("bad-recipe", "shift-scale: shift and scale must not be 0")
        for part in self.codecs:
            refuse_inner("shift-scale", part)

    @cached_property
    def codecs(self) -> tuple[Method, Method]:
        """Of the vector, and of the rest."""
        return parse_spec(self.vector), parse_spec(self.rest)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What either codec needs."""
        wanted = {need for part in self.codecs for need in part.needs}
        return tuple(n for n in NEEDS if n in wanted)

    @property
    def blockwise(self) -> bool:
        """Whether both codecs code a row without a look at others."""
        return all(getattr(part, "blockwise", False) for part in self.codecs)

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """The terms of both."""
        vector, rest = self.codecs
        shape, left = tuple(delta.shape), delta.clone()
        terms = [_times(encoded, self.shift) for encoded in vector.encode(delta, context)]
        for term, parts in terms:
            left -= term.decode(parts, shape, context)
        return [*terms, *(_times(e, self.scale) for e in rest.encode(left, context))]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """The terms of both."""
        return [term for part in self.codecs for term in part.plan(shape, dtype)]


def refuse_inner(who: str, part: Method) -> None:
    """Raises `bad-recipe` for a codec that leaves no rest, or must see the whole model first."""
    if any(is_exact(term) for term in part.plan((8, 8), "F32")):
        raise DeltafoldError(
            "bad-recipe", f"{who}: {spec_of(part)} keeps the fine-tune's own values, not a delta"
        )
    if looks_around(part):
        raise DeltafoldError(
            "bad-recipe",
            f"{who}: {spec_of(part)} looks at the whole model, and must stand by itself",
        )


def _times(encoded: Encoded, factor: float) -> Encoded:
    return encoded if factor == 1 else scaled(encoded, factor)
