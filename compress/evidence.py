"""What a method may know of a tensor beyond the two checkpoints, and who must provide it.

A method names its needs; a run that cannot meet them is refused before any work. Evidence is
gathered once for a calibration set and looked up tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch

from deltafold.compress.errors import DeltafoldError

#: `activations`: second moments of the layers' inputs, and some inputs; `gradients`: of the loss, at
#: the fine-tune; `logits`: forward passes of whole models; `labels`: examples with answers;
#: `reference`: a third checkpoint (an aligned or an unaligned model).
#: `sequential`: activations of layers that stand behind others as compressed.
#: `safe-activations`, `safe-gradients`: the same of the aligned model, on safe answers.
Need: TypeAlias = Literal[
    "activations",
    "gradients",
    "logits",
    "labels",
    "reference",
    "sequential",
    "safe-activations",
    "safe-gradients",
]
#: What a third checkpoint is: a model with safety training, or one without; or another fine-tune.
Role: TypeAlias = Literal["aligned", "unaligned", "task"]
NEEDS: Final[tuple[Need, ...]] = get_args(Need)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one tensor.

    Attributes:
        second_moment: float32 `[M, M]`, the mean over tokens of `x x^T` of the inputs of the layer
            that multiplies by this tensor; None where no such layer was seen. M are the columns of
            the tensor: the layer computes `x W^T`.
        gradient: float32 of the tensor's shape, the mean gradient of the loss at the fine-tune.
        fisher: float32 of the tensor's shape, the mean squared gradient over examples.
        references: the same tensor of other checkpoints, by role (`aligned`, `unaligned`,
            `task`; several of a role are told apart by what stands behind a colon).
        inputs: float32 `[n, M]`, inputs of that layer at a few tokens, at the fine-tune.
        row_moment: float32 `[N, N]`, the second moments where the layer computes `x W` (transformers'
            Conv1D) and inputs meet the tensor's rows; then `second_moment` and `inputs` are None.
        safe: the same of the aligned model on safe answers; None where there are none.
    """

    second_moment: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    references: Mapping[str, torch.Tensor] = field(default_factory=dict)
    inputs: torch.Tensor | None = None
    row_moment: torch.Tensor | None = None
    safe: Evidence | None = None

    def rows(self, index: torch.Tensor) -> Evidence:
        """The same of some rows of the tensor; the inputs of a layer are those of all its rows."""
        return Evidence(
            second_moment=self.second_moment,
            gradient=None if self.gradient is None else self.gradient[index],
            fisher=None if self.fisher is None else self.fisher[index],
            references={role: tensor[index] for role, tensor in self.references.items()},
            inputs=self.inputs,
            safe=None if self.safe is None else self.safe.rows(index),
        )


def is_task(role: str) -> bool:
    """Whether a reference is another fine-tune of the base."""
    return role.partition(":")[0] == "task"


class EvidenceSource(Protocol):
    """Where a packing run takes evidence from."""

    @property
    def provides(self) -> Sequence[Need]:
        """The needs that it meets."""
        ...

    def of(self, name: str) -> Evidence:
        """What is known of one tensor."""
        ...


def known(
    evidence: Evidence | None, what: Literal["gradient", "fisher"], who: str, tensor: str
) -> torch.Tensor:
    """One piece of evidence of a tensor; raises `needs-calibration` where the run has none of it."""
    found: torch.Tensor | None = None if evidence is None else getattr(evidence, what)
    if found is None:
        raise DeltafoldError(
            "needs-calibration",
            f"{who} needs the {what} of {tensor}, which the calibration run did not see.",
            fix=f"give {who} a pattern of the tensors that it is for: --edit 'PATTERN={who}'",
        )
    return found


@runtime_checkable
class SequentialSource(EvidenceSource, Protocol):
    """A source of evidence that is `sequential`: it is told what becomes of every tensor."""

    def order(self, names: Sequence[str]) -> list[str]:
        """The order in which tensors must be compressed: as the model runs."""
        ...

    def settle(self, name: str, value: torch.Tensor) -> None:
        """Take note of a compressed tensor: base plus decoded difference, float32."""
        ...

    def restart(self) -> None:
        """Forget what was settled: the model is the fine-tune again."""
        ...


@runtime_checkable
class RunningSource(EvidenceSource, Protocol):
    """A source of evidence that runs a model in this process."""

    def upcoming_bytes(self) -> int:
        """Memory that the run will take beyond what it holds now."""
        ...


def follower(source: EvidenceSource | None) -> SequentialSource | None:
    """A source that wants to follow the run which begins, its model the fine-tune; else None."""
    if source is None or "sequential" not in source.provides:
        return None
    if not isinstance(source, SequentialSource):
        return None
    source.restart()
    return source


def check_needs(needs: Sequence[Need], source: EvidenceSource | None, who: str) -> None:
    """Raises `needs-calibration` where a method needs what nobody provides."""
    missing = [n for n in needs if source is None or n not in source.provides]
    if missing:
        raise DeltafoldError(
            "needs-calibration",
            f"{who} needs {', '.join(missing)}, and this run has none.",
            facts=[("given", ", ".join(source.provides) if source else "no calibration data")],
            fix="; ".join(_fixes(missing)),
        )


def _fixes(missing: Sequence[Need]) -> Iterator[str]:
    safe = [n for n in missing if n.startswith("safe-")]
    if set(missing) - {"reference", *safe}:
        yield "give a calibration set: --calibrate prompts.jsonl"
    if "reference" in missing:
        yield "name the checkpoint: --reference unaligned=MODEL"
    if safe:
        yield "give harmful prompts with safe answers: --safe refusals.jsonl"
