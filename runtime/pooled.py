"""Requests to models that do not generate, what they answer, and the protocol of their engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from deltafold.runtime.engine import Served

if TYPE_CHECKING:
    import torch

#: Text, a pair of texts, token ids, or a picture (a `PIL.Image.Image`, a `Path`, a uint8 array).
Input: TypeAlias = "str | tuple[str, str] | Sequence[int] | Any"


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """One text or picture. `variant` is a served name; the base answers to "base" and its own."""

    variant: str
    input: Input


@dataclass(frozen=True, slots=True)
class Pooled:
    """What every answer says of itself.

    Attributes:
        variant: served name.
        digest: of what answered.
        tokens: of the text; 0 for a picture.
    """

    variant: str
    digest: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Scores(Pooled):
    """A classification.

    Attributes:
        label: the likeliest one's name, by the variant's own configuration.
        probabilities: of each label: by softmax, or by a sigmoid each where labels do not exclude
            one another or where there is one alone. Regressions are given as they are.
        logits: what the head said.
        labels: names of all of them.
    """

    label: str
    probabilities: tuple[float, ...]
    logits: tuple[float, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Vector(Pooled):
    """An embedding: float32 `[D]` on the CPU."""

    vector: torch.Tensor


@dataclass(frozen=True, slots=True)
class Outputs(Pooled):
    """What the variant's own class returned for one request, by name, on the CPU."""

    outputs: Mapping[str, torch.Tensor]


class Pooler(Served, Protocol):
    """An engine whose models answer at once."""

    @property
    def pictures(self) -> bool:
        """Whether requests may be pictures."""
        ...

    def classify(self, requests: Sequence[PoolRequest]) -> list[Scores]:
        """Labels by each variant's own head, in the requests' order."""
        ...

    def embed(
        self,
        requests: Sequence[PoolRequest],
        *,
        pooling: Any = "auto",
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> list[Vector]:
        """Vectors in the requests' order."""
        ...
