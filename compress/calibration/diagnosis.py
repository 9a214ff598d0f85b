"""Edits and codecs, told by what they do to the loss: competitive, decreased or improved.

The three words are those of arXiv 2410.13841, section 4. Here they describe one fine-tune on one set
of examples, and nothing else; a codec's class is no guarantee for another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from deltafold.compress.budget.probe import rebuilt
from deltafold.compress.calibration import riemann
from deltafold.compress.calibration.data import CalibrationSet
from deltafold.compress.calibration.evidence import CalibratedEvidence
from deltafold.compress.calibration.model import load_source, load_tensors
from deltafold.compress.calibration.quality import (
    Quality,
    compare_logits,
    logits_of,
    mean_loss,
)
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.companions import vocabulary
from deltafold.compress.edits import parse_edit
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.methods import LosslessMethod, parse_spec
from deltafold.compress.recipe import Recipe

Class: TypeAlias = Literal["competitive", "decreased", "improved"]

#: A loss difference below this share of what the fine-tune gained over the base counts as none.
SHARE: Final = 0.01
#: So does one below this many standard errors.
ERRORS: Final = 2.0


@dataclass(frozen=True)
class Verdict:
    """What one edit or codec does to the loss; all in nats a token.

    Attributes:
        spec: the edit or codec.
        kind: which of the two.
        found: the edited model beside the fine-tune.
        standard_error: of the loss difference, over rows.
        tolerance: differences up to this count as none.
        terms: the Riemann term of every parameter that changed.
        steps: of the sum.
    """

    spec: str
    kind: Literal["codec", "edit"]
    found: Quality
    standard_error: float
    tolerance: float
    terms: dict[str, float]
    steps: int

    @property
    def difference(self) -> float:
        """Loss of the edited model minus the fine-tune's, by two forward passes."""
        return self.found.loss - self.found.reference_loss

    @property
    def predicted(self) -> float:
        """The Riemann sum over all parameters."""
        return riemann.total(self.terms)

    @property
    def label(self) -> Class:
        """`competitive` where the difference counts as none, else by its sign."""
        if abs(self.difference) <= self.tolerance:
            return "competitive"
        return "decreased" if self.difference > 0 else "improved"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "spec": self.spec,
            "kind": self.kind,
            "class": self.label,
            "loss_difference": self.difference,
            "standard_error": self.standard_error,
            "tolerance": self.tolerance,
            "riemann": self.predicted,
            "quadrature_gap": self.predicted - self.difference,
            "steps": self.steps,
            **self.found.to_json(),
            "tensors": self.terms,
        }


@dataclass(frozen=True)
class Diagnosis:
    """Verdicts on one fine-tune.

    Attributes:
        base_loss: of the base on the same data; None where it does not know all of its tokens.
        loss: the fine-tune's.
        data: what manifests record of the data.
        verdicts: one an edit or codec.
    """

    base_loss: float | None
    loss: float
    data: dict[str, Any]
    verdicts: tuple[Verdict, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "base_loss": self.base_loss,
            "loss": self.loss,
            "data": self.data,
            "thresholds": {"share_of_gain": SHARE, "standard_errors": ERRORS},
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
        }


@dataclass(frozen=True)
class Diagnose:
    """What is diagnosed, and how.

    Attributes:
        base: the base.
        target: the fine-tune.
        data: what the losses are measured on.
        evidence: of the fine-tune as it is, for codecs and edits that need some.
        steps: of the Riemann sum.
        group_bytes: most memory for gradients.
        device: where models run.
        progress: called with each spec before its work.
    """

    base: Checkpoint
    target: TensorSource
    data: CalibrationSet
    evidence: CalibratedEvidence | None = None
    steps: int = riemann.STEPS
    group_bytes: int = riemann.GROUP_BYTES
    device: str = "cpu"
    progress: Callable[[str], None] = lambda spec: None

    def run(self, codecs: Sequence[str], edits: Sequence[str]) -> Diagnosis:
        """Judge codecs and edits, by spec.

        Raises:
            DeltafoldError: `bad-argument` for steps below 1; whatever specs and codecs raise.
        """
        if self.steps < 1:
            raise DeltafoldError("bad-argument", f"--steps must be at least 1, not {self.steps}.")
        kinds: list[tuple[Literal["codec", "edit"], str]] = [("codec", s) for s in codecs]
        kinds += [("edit", s) for s in edits]
        chosen = [(kind, spec, _recipe(kind, spec)) for kind, spec in kinds]
        base_loss = self._base_loss()
        verdicts = []
        for kind, spec, recipe in chosen:
            self.progress(spec)
            verdicts.append(self._judge(kind, spec, recipe, base_loss))
        loss = verdicts[0].found.reference_loss if verdicts else math.nan
        return Diagnosis(base_loss, loss, self.data.record(), tuple(verdicts))

    def _evidence(self, recipe: Recipe) -> CalibratedEvidence | None:
        needs = recipe.needs()
        if self.evidence is None or "sequential" not in needs:
            return self.evidence
        # Its layers see those before them as this codec leaves them, others the fine-tune's.
        return CalibratedEvidence(
            self.target,
            self.data,
            wanted=needs,
            references=self.evidence.references,
            safe=self.evidence.safe,
            device=self.device,
            group_bytes=self.group_bytes,
        )

    def _base_loss(self) -> float | None:
        highest = max(int(row.ids.max()) for row in self.data.rows)
        words, _ = vocabulary(self.base.folder)
        if words is not None and highest >= words:
            return None
        return mean_loss(load_source(self.base, device=self.device), self.data)

    def _judge(
        self, kind: Literal["codec", "edit"], spec: str, recipe: Recipe, base_loss: float | None
    ) -> Verdict:
        # Loaded afresh for each: the sum moves it along the change.
        model = load_source(self.target, device=self.device)
        tensors = rebuilt(self.base, self.target, recipe, self._evidence(recipe))
        edited = load_tensors(self.target.reference.folder, tensors, device=self.device)
        del tensors
        found, error = compared_by_row(model, edited, self.data)
        terms = riemann.loss_terms(
            model,
            riemann.difference(model, edited),
            self.data,
            steps=self.steps,
            group_bytes=self.group_bytes,
        )
        gain = 0.0 if base_loss is None else abs(base_loss - found.reference_loss)
        tolerance = max(SHARE * gain, ERRORS * error)
        return Verdict(spec, kind, found, error, tolerance, terms, self.steps)


def compared_by_row(reference: Any, other: Any, data: CalibrationSet) -> tuple[Quality, float]:
    """Two models side by side, and the standard error of their loss difference over rows."""
    rows = [
        compare_logits([ours], [theirs])
        for ours, theirs in zip(
            logits_of(reference, data, batch=1), logits_of(other, data, batch=1), strict=True
        )
    ]
    tokens = max(sum(row.tokens for row in rows), 1)

    def mean(figure: Callable[[Quality], float]) -> float:
        return sum(figure(row) * row.tokens for row in rows) / tokens

    whole = Quality(
        tokens,
        mean(lambda row: row.reference_loss),
        mean(lambda row: row.loss),
        mean(lambda row: row.kl),
        mean(lambda row: row.agreement),
    )
    apart = whole.loss - whole.reference_loss
    spread = sum(
        ((row.loss - row.reference_loss - apart) * row.tokens / tokens) ** 2 for row in rows
    )
    count = len(rows)
    error = math.sqrt(spread * count / (count - 1)) if count > 1 else math.inf
    return whole, error


def _recipe(kind: str, spec: str) -> Recipe:
    if kind == "codec":
        return Recipe(default=parse_spec(spec))
    # A codec that keeps values stores an edited delta in float32: the edit alone is seen.
    return Recipe(default=LosslessMethod(), edits=(("*", parse_edit(spec)),))
