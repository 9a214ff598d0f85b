"""The contract of a family method: what several deltas of one base are stored in common.

A family method is a frozen dataclass whose fields are its options. It makes one shared tensor of a
tensor's deltas; what each delta takes of it is a `shared` term.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import torch

from deltafold.compress.evidence import Need
from deltafold.compress.spec import build_from_spec
from deltafold.compress.terms import Context, Encoded, Shared


@runtime_checkable
class FamilyMethod(Protocol):
    """A way to store deltas together."""

    id: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    applied: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]

    def share(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        """The shared tensor, float32 `[groups * N, M]`, of float32 deltas `[N, M]`."""
        ...

    def term(self, members: int) -> Shared:
        """The term of each delta, its family and key not filled in, for so many members."""
        ...

    def weigh(self, delta: torch.Tensor, stored: torch.Tensor) -> tuple[float, float]:
        """Two numbers of one tensor of a delta and its shared tensor as it is stored, `[N, M]`.

        Summed over all tensors, the first over the second is the delta's scale; 1 if that is 0.
        """
        ...

    def remainder(self, left: torch.Tensor, context: Context) -> list[Encoded]:
        """Terms for what a delta's `shared` term leaves of a tensor; none leaves it lost."""
        ...


FAMILIES: Final[dict[str, type[Any]]] = {}


def family(cls: type[Any]) -> type[Any]:
    """Class decorator: make a family method known under its id; a duplicate is an error."""
    assert cls.id not in FAMILIES, f"two family methods share the id {cls.id!r}"
    FAMILIES[cls.id] = cls
    return cls


def parse_family(spec: str) -> FamilyMethod:
    """`name:key=value,...` as a family method. Raises `unknown-codec` or `bad-recipe`."""
    built: FamilyMethod = build_from_spec(
        spec, FAMILIES, kind="family method", group="deltafold.families", flag="--method"
    )
    return built
