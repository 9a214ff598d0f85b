"""How well a model predicts, and how close it is to another: loss, perplexity, KL, agreement.

Figures are means over the tokens that the calibration set asks for, in nats, computed in float32 and
summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from deltafold.compress.calibration.batches import IGNORED, Batch
from deltafold.compress.calibration.data import CalibrationSet


class Predictions(NamedTuple):
    """What a model says of the asked tokens of one batch: float32 `[n, V]`, and int64 `[n]`."""

    logits: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, slots=True)
class Quality:
    """One model beside another, the reference.

    Attributes:
        tokens: over how many predictions.
        reference_loss: mean negative log-likelihood of the reference, in nats.
        loss: that of the other.
        kl: mean KL(reference || other), in nats.
        agreement: share of tokens where both find the same one likeliest.
    """

    tokens: int
    reference_loss: float
    loss: float
    kl: float
    agreement: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def reference_perplexity(self) -> float:
        """exp(reference_loss)."""
        return math.exp(self.reference_loss)

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        figures = asdict(self)
        return {
            **figures,
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
        }


def batch_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits float32 `[B, T, V]` of a batch that is on the model's device; gradients flow."""
    output = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    logits: torch.Tensor = output.logits.float()
    return logits


def predictions(logits: torch.Tensor, batch: Batch) -> Predictions:
    """The asked positions: what stands before each labelled token predicts it."""
    wanted = batch.labels[:, 1:] != IGNORED
    return Predictions(logits[:, :-1][wanted], batch.labels[:, 1:][wanted])


@torch.inference_mode()
def logits_of(model: Any, data: CalibrationSet, *, batch: int = 8) -> Iterator[Predictions]:
    """Predictions batch by batch; keep them in a list to compare many models with one."""
    device = next(model.parameters()).device
    for rows in data.batches(batch):
        moved = rows.to(device)
        yield predictions(batch_logits(model, moved), moved)


def mean_loss(model: Any, data: CalibrationSet, *, batch: int = 8) -> float:
    """Mean negative log-likelihood of the asked tokens, in nats."""
    total = sum(
        torch.nn.functional.cross_entropy(p.logits, p.targets, reduction="sum").item()
        for p in logits_of(model, data, batch=batch)
    )
    return total / data.predicted


def compare(reference: Any, other: Any, data: CalibrationSet, *, batch: int = 8) -> Quality:
    """Run two models over a set."""
    return compare_logits(
        logits_of(reference, data, batch=batch), logits_of(other, data, batch=batch)
    )


@torch.inference_mode()
def compare_logits(reference: Iterable[Predictions], other: Iterable[Predictions]) -> Quality:
    """The same from what `logits_of` gave, for the same set and batches.

    Where vocabularies differ in size, the tokens that both have are compared.
    """
    tokens, sums = 0, torch.zeros(4, dtype=torch.float64)
    for ours, theirs in zip(reference, other, strict=True):
        words = min(ours.logits.shape[1], theirs.logits.shape[1])
        known = ours.targets < words
        first = torch.log_softmax(ours.logits[known, :words], dim=1)
        second = torch.log_softmax(theirs.logits.to(first.device)[known, :words], dim=1)
        at = ours.targets[known].unsqueeze(1)
        # A token that a model rules out has probability 0 and adds nothing.
        apart = torch.where(first.isneginf(), 0.0, first.exp() * (first - second))
        figures = (
            -first.gather(1, at),
            -second.gather(1, at),
            apart,
            first.argmax(dim=1) == second.argmax(dim=1),
        )
        sums += torch.stack([f.sum(dtype=torch.float64).cpu() for f in figures])
        tokens += int(known.sum())
    means = (sums / max(tokens, 1)).tolist()
    # Rounding may leave a KL of equal distributions a hair below zero.
    return Quality(tokens, means[0], means[1], max(means[2], 0.0), means[3])
