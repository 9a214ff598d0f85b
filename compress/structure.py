"""How a fine-tune's tensors relate to its base's, decided before any byte is coded.

A fine-tune usually has just the base's names and shapes. Where it has not, the usual reason is that
someone took the wrong base, so each kind of difference is refused until the user accepts it by name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.errors import DeltafoldError, name_some

#: What `accept` may hold, and what it lets through.
ACCEPTABLE: Final = {
    "new-tensors": "tensors that the base lacks are stored as they are",
    "missing-tensors": "tensors of the base that the fine-tune lacks are recorded as absent",
    "resized": "another number of rows: added rows are stored as values",
    "tokenizer": "the fine-tune's own tokenizer is packed and used for its requests",
}


@dataclass(frozen=True, slots=True)
class Structure:
    """Names of tensors by their relation to the base, each sorted."""

    shared: list[str]
    resized: list[str]
    new: list[str]
    absent: list[str]

    @property
    def accepted(self) -> list[str]:
        """The kinds of difference that are there."""
        kinds = [("new-tensors", self.new), ("missing-tensors", self.absent)]
        kinds.append(("resized", self.resized))
        return [kind for kind, names in kinds if names]


def compare(base: TensorSource, variant: TensorSource, accept: Collection[str]) -> Structure:
    """Sort the fine-tune's tensors by their relation to the base.

    Raises:
        DeltafoldError: `shape-mismatch`, `unexpected-tensor` or `missing-tensor` for a difference
            that is not accepted, `bad-argument` for an unknown word in `accept`.
    """
    unknown = sorted(set(accept) - set(ACCEPTABLE))
    if unknown:
        raise DeltafoldError(
            "bad-argument",
            f"--accept does not know {unknown[0]!r}.",
            facts=[("known", ", ".join(ACCEPTABLE))],
        )
    in_base, in_variant = set(base.names()), set(variant.names())
    shared = sorted(in_base & in_variant)
    resized = [n for n in shared if base.spec(n).shape != variant.spec(n).shape]
    found = Structure(
        shared=[n for n in shared if n not in set(resized)],
        resized=resized,
        new=sorted(in_variant - in_base),
        absent=sorted(in_base - in_variant),
    )
    _refuse_shapes(base, variant, found, accept)
    _refuse_names(base, variant, found, accept)
    return found


def _refuse_shapes(
    base: TensorSource, variant: TensorSource, found: Structure, accept: Collection[str]
) -> None:
    for name in found.resized:
        ours, theirs = base.spec(name).shape, variant.spec(name).shape
        rows_only = len(ours) == len(theirs) >= 1 and ours[1:] == theirs[1:]
        if rows_only and "resized" in accept:
            continue
        raise DeltafoldError(
            "shape-mismatch",
            f"{name} has another shape in the fine-tune than in the base.",
            facts=[
                ("base", f"{list(ours)}  {base.reference.name}"),
                ("fine-tune", f"{list(theirs)}  {variant.reference.name}"),
                ("differing", name_some(found.resized, len(base.names()))),
            ],
            fix="if rows were added on purpose (a larger vocabulary), pack with --accept resized"
            if rows_only
            else "check that this fine-tune was made from this base",
        )


def _refuse_names(
    base: TensorSource, variant: TensorSource, found: Structure, accept: Collection[str]
) -> None:
    if found.new and "new-tensors" not in accept:
        raise DeltafoldError(
            "unexpected-tensor",
            f"the fine-tune {variant.reference.name} has tensors that the base lacks.",
            facts=[("unexpected", name_some(found.new, len(variant.names())))],
            fix="check that this fine-tune was made from this base; if they are meant (a new head), "
            "pack with --accept new-tensors",
        )
    if found.absent and "missing-tensors" not in accept:
        raise DeltafoldError(
            "missing-tensor",
            f"the fine-tune {variant.reference.name} lacks tensors of the base.",
            facts=[("missing", name_some(found.absent, len(base.names())))],
            fix="check that the fine-tune was saved whole; if they are meant to be gone, pack with "
            "--accept missing-tensors",
        )
