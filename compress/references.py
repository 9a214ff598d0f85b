"""Other checkpoints that a codec or an edit may look at beside base and fine-tune, by role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, get_args, runtime_checkable

import torch

from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Evidence, EvidenceSource, Need, Role
from deltafold.compress.naming import NamedBase
from deltafold.compress.source import open_variant


@dataclass(frozen=True)
class Reference:
    """One of them.

    Attributes:
        name: of the model, for records.
        source: its tensors under the fine-tune's names.
        names: those that it has.
    """

    name: str
    source: NamedBase | TensorSource
    names: frozenset[str]

    @classmethod
    def of(cls, source: NamedBase | TensorSource) -> Reference:
        """A checkpoint that is open."""
        return cls(source.reference.name, source, frozenset(source.names()))


@runtime_checkable
class ReferenceSource(EvidenceSource, Protocol):
    """A source of evidence that has other checkpoints, perhaps among other things."""

    references: Mapping[str, Reference]


@dataclass(frozen=True)
class ReferenceEvidence:
    """An `EvidenceSource` of nothing but other checkpoints, for runs without calibration data."""

    provides: ClassVar[tuple[Need, ...]] = ("reference",)

    references: Mapping[str, Reference]

    def of(self, name: str) -> Evidence:
        """The same tensor of the others, float32."""
        return Evidence(references=tensors_of(self.references, name))

    def record(self) -> dict[str, object]:
        """What a manifest says about them."""
        return {"references": names_of(self.references)}


def compare_with(
    base: str | Path, variant: str | Path, references: Mapping[str, str | Path]
) -> ReferenceEvidence:
    """Evidence of other checkpoints alone; arguments and errors as `open_references` has them."""
    checkpoint = Checkpoint.open(base)
    target = open_variant(variant, checkpoint)
    return ReferenceEvidence(open_references(references, checkpoint, target))


def open_references(
    references: Mapping[str, str | Path], base: Checkpoint, variant: TensorSource
) -> dict[str, Reference]:
    """Open other checkpoints.

    Args:
        references: folders or hub ids, of checkpoints or lossless deltas, by role: `aligned`,
            `unaligned`, and `task` for other fine-tunes, of which there may be several: `task:law`.
        base: the base.
        variant: the fine-tune, whose names their tensors go by.

    Raises:
        DeltafoldError: `bad-argument` for an unknown role, or where there are not as many; whatever
            opening raises.
    """
    opened = {}
    for role, folder in references.items():
        if role.partition(":")[0] not in get_args(Role) or (":" in role and role[:5] != "task:"):
            raise DeltafoldError(
                "bad-argument",
                f"{role!r} is no role of a reference checkpoint.",
                facts=[("roles", ", ".join(get_args(Role)))],
                fix="--reference aligned=FOLDER",
            )
        found = open_variant(folder, base)
        source = NamedBase.of(found, variant) if isinstance(found, Checkpoint) else found
        opened[role] = Reference.of(source)
    return opened


class _Tensors(Mapping[str, torch.Tensor]):
    """One tensor of several checkpoints, each read when it is asked for."""

    def __init__(self, references: Mapping[str, Reference], name: str) -> None:
        self._name = name
        self._having = {r: found for r, found in references.items() if name in found.names}

    def __getitem__(self, role: str) -> torch.Tensor:
        return self._having[role].source.tensor(self._name).to(torch.float32)

    def __contains__(self, role: object) -> bool:
        return role in self._having

    def __iter__(self) -> Iterator[str]:
        return iter(self._having)

    def __len__(self) -> int:
        return len(self._having)


def tensors_of(references: Mapping[str, Reference], name: str) -> Mapping[str, torch.Tensor]:
    """A tensor of all that have it, float32, by role; read when they are asked for."""
    return _Tensors(references, name)


def names_of(references: Mapping[str, Reference]) -> dict[str, str]:
    """Names of models by role."""
    return {role: reference.name for role, reference in sorted(references.items())}
