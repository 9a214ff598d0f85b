"""Edits, then a codec: `trim:keep=0.2+int:bits=4`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.edits.base import Edit, SurveyedEdit
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import NEEDS, Need
from deltafold.compress.methods.base import Method, SurveyedMethod
from deltafold.compress.methods.exact import ExactMethod
from deltafold.compress.spec import spec_of
from deltafold.compress.terms import Context, Dense, Encoded, Term, is_exact


@dataclass(frozen=True)
class Chain:
    """A method made of edits and a codec.

    A codec that keeps the fine-tune's own values has none to keep of an edited delta: such tensors
    are stored as float32 differences.

    Attributes:
        edits: applied in order.
        codec: what stores the result.
    """

    id: ClassVar[str] = "chain"
    summary: ClassVar[str] = "edits, then a codec"
    paper: ClassVar[str] = "-"
    applied: ClassVar[str] = "as its codec"

    edits: tuple[Edit, ...]
    codec: Method

    @property
    def needs(self) -> tuple[Need, ...]:
        """All that an edit or the codec needs."""
        wanted = {n for step in self.edits for n in step.needs} | set(self.codec.needs)
        return tuple(n for n in NEEDS if n in wanted)

    @property
    def blockwise(self) -> bool:
        """Whether edits and codec all change a row without a look at others."""
        return all(getattr(part, "blockwise", False) for part in (*self.edits, self.codec))

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """The codec's terms for the edited delta."""
        for step in self.edits:
            delta = step.apply(delta, context)
        if not bool(torch.isfinite(delta).all()):
            raise DeltafoldError(
                "not-finite",
                f"{context.name}: an edit gave NaN or infinite entries.",
                facts=[("edits", ", ".join(map(spec_of, self.edits)))],
            )
        if self._keeps_values(tuple(delta.shape)):
            return [Dense().encode(delta, context)]
        return self.codec.encode(delta, context)

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """The codec's terms."""
        return [Dense()] if self._keeps_values(shape) else self.codec.plan(shape, dtype)

    def for_scalars(self) -> Chain:
        """The same edits before a codec that takes tensors without dimensions."""
        inner = self.codec.for_scalars() if isinstance(self.codec, Chain) else ExactMethod()
        return Chain(self.edits, inner)

    def spec(self) -> str:
        """Edits and codec, joined by plus signs."""
        return "+".join(map(spec_of, (*self.edits, self.codec)))

    def _keeps_values(self, shape: tuple[int, ...]) -> bool:
        return any(is_exact(term) for term in self.codec.plan(shape, "F32"))


def steps_of(method: Method) -> list[Edit]:
    """The edits of a method, those of a chain within a chain included, in order."""
    return [*method.edits, *steps_of(method.codec)] if isinstance(method, Chain) else []


def codec_of(method: Method) -> Method:
    """What stores the result of a method's edits."""
    return codec_of(method.codec) if isinstance(method, Chain) else method


def looks_around(method: Method) -> bool:
    """Whether a method or an edit before it must see the whole model first."""
    return isinstance(codec_of(method), SurveyedMethod) or any(
        isinstance(step, SurveyedEdit) for step in steps_of(method)
    )
