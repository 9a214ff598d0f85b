"""Packing: a base, a fine-tune and a recipe in; a delta repo out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from deltafold.compress.assembly import Run
from deltafold.compress.budget.plan import Plan
from deltafold.compress.budget.probe import Judge
from deltafold.compress.budget.run import judged, plan_of
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.coded import TensorStats
from deltafold.compress.companions import check_tokenizer, named
from deltafold.compress.encode import CPU
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import EvidenceSource
from deltafold.compress.limits import Limits
from deltafold.compress.manifest import (
    Manifest,
    Quantization,
)
from deltafold.compress.memory import MemoryBudget
from deltafold.compress.naming import NamedBase
from deltafold.compress.placing import device_named, parsed_device
from deltafold.compress.predict import Prediction, predict
from deltafold.compress.progress import OnProgress, ignore
from deltafold.compress.quality import record_quality
from deltafold.compress.quantized import quantization_of
from deltafold.compress.recipe import Recipe
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.sizes import parse_size
from deltafold.compress.source import open_variant
from deltafold.compress.staging import Staging
from deltafold.compress.streaming import Given, nothing_given
from deltafold.compress.structure import compare
from deltafold.compress.terms import SharedSource
from deltafold.compress.verify import check_payload


@dataclass(frozen=True)
class PackReport:
    """The outcome of a packing run; sizes in bytes.

    `plan` is there where the recipe had a budget. `resumed` counts tensors that an earlier run, cut
    short, had finished; `on_device` those that were coded on `device`, not the CPU.
    """

    out: Path
    manifest: Manifest
    stats: dict[str, TensorStats] = field(default_factory=dict)
    plan: Plan | None = None
    resumed: int = 0
    device: str = "cpu"
    on_device: int = 0

    @property
    def ratio(self) -> float:
        """Delta size over the fine-tune's."""
        return self.manifest.totals.ratio

    @property
    def coverage(self) -> float:
        """Share of the fine-tune's tensors that are accounted for; 1.0 or the run has failed."""
        return self.manifest.totals.coverage

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The tensors with the largest relative error."""
        errors = [(name, e.rel_error) for name, e in self.manifest.tensors.items()]
        return sorted(errors, key=lambda item: -item[1])[:count]


def compress_checkpoint(
    base: str | Path,
    variant: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    accept: Collection[str] = (),
    overwrite: bool = False,
    base_quantization: str | None = None,
    command: str = "",
    evidence: EvidenceSource | None = None,
    quality: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    jobs: int = 1,
    max_memory: int | str | None = None,
    fresh: bool = False,
    device: str = "cpu",
    progress: OnProgress = ignore,
) -> PackReport:
    """Pack a fine-tune as a delta against its base.

    Args:
        base: folder or hub id of the base checkpoint.
        variant: folder or hub id of the fine-tune: a checkpoint, or a lossless delta repo.
        out: the delta repo to write; nothing stands there until it is whole and verified.
        recipe: which codec for which tensor; the default is four sign planes in groups of 128.
        accept: differences in structure that are meant, see `structure.ACCEPTABLE`.
        overwrite: replace an existing `out`.
        base_quantization: take the difference to the base as it is once quantised so (`nf4` or
            `int8`), not to the base itself: the delta then repairs the quantisation's error, and
            is served on such a base alone.
        command: recorded in the manifest and card.
        evidence: of a calibration run, for methods that need one.
        quality: recorded in the manifest: what was measured, and on what data.
        judge: measures KL to the fine-tune; a recipe with a budget of KL needs one. What it finds of
            the packed delta is recorded in the manifest as well.
        jobs: tensors coded at a time, one with `evidence`; the bytes do not depend on it.
        max_memory: most memory of the whole process, in bytes or as `4GiB`; None means no bound. It
            bounds the coding of tensors, not calibration, which runs the model.
        fresh: start over; otherwise a run with the same inputs and settings that was cut short
            (interrupted, killed, a full disk) goes on where it stopped.
        device: where codecs run whose cost is arithmetic (`svd`, `svd-act`, `svd-widths`, `delta-come`,
            `deltazip`, `int-hessian`, `codebook`), one tensor at a time; others stay on the CPU. The
            bytes of these codecs are those of that device: it rounds as its own libraries do.
        progress: called after every tensor.

    Raises:
        DeltafoldError: whatever is wrong, before anything stands under `out`.
    """
    where = device_named(device)
    opened = _opened(base, variant)
    job = replace(
        opened,
        recipe=recipe or Recipe(),
        accept=frozenset(accept),
        command=command,
        progress=progress,
        evidence=evidence,
        quality=quality or {},
        judge=judge,
        device=where,
        quantization=quantization_of(opened.source, base_quantization)
        if base_quantization
        else None,
    )
    memory = max_memory
    if isinstance(memory, str):
        memory = parse_size(memory, "--max-memory 4GiB")
    return pack(job, out, overwrite=overwrite, limits=Limits(jobs, memory), fresh=fresh)


def plan_checkpoint(
    base: str | Path,
    variant: str | Path,
    *,
    recipe: Recipe | None = None,
    accept: Collection[str] = (),
    evidence: EvidenceSource | None = None,
    judge: Judge | None = None,
    progress: OnProgress = ignore,
) -> Plan:
    """What `compress_checkpoint` would write, without writing it; arguments and errors are the same.

    With a judge the KL of some points of the frontier is measured too.
    """
    job = replace(
        _opened(base, variant),
        recipe=recipe or Recipe(),
        accept=frozenset(accept),
        progress=progress,
        evidence=evidence,
        judge=judge,
    )
    compare(job.source, job.target, job.accept)
    Run(job).check()
    return plan_of(job, sketch=True)


def predict_checkpoint(
    base: str | Path,
    variant: str | Path,
    *,
    recipe: Recipe | None = None,
    accept: Collection[str] = (),
    base_quantization: str | None = None,
    limits: Limits | None = None,
    device: str = "cpu",
    fit: bool = False,
) -> Prediction:
    """What `compress_checkpoint` would write and take, from the files' headers; in seconds.

    `device` and `fit` are for the memory of models that calibration or fitting would run.

    Raises:
        DeltafoldError: what can be wrong with inputs, recipe and structure.
    """
    parsed_device(device)
    opened = _opened(base, variant)
    quantization = quantization_of(opened.source, base_quantization) if base_quantization else None
    job = replace(
        opened, recipe=recipe or Recipe(), accept=frozenset(accept), quantization=quantization
    )
    compare(job.source, job.target, job.accept)
    Run(job).check_patterns()
    return predict(job, limits or Limits(), device=device, fit=fit)


def _opened(base: str | Path, variant: str | Path) -> Job:
    """Base, fine-tune and the small files of the delta; everything else at its default."""
    checkpoint = Checkpoint.open(base)
    target = open_variant(variant, checkpoint)
    source = NamedBase.of(checkpoint, target)
    return Job(source, target, named(target.reference.folder), Recipe())


@dataclass(frozen=True)
class Job:
    """What is packed, and how.

    Attributes:
        source: the base, under the fine-tune's names.
        target: the fine-tune.
        companions: the small files of the delta repo: name there -> file to copy.
        recipe: which codec for which tensor.
        accept: differences in structure that are meant.
        command: recorded in the manifest and card.
        progress: called after every tensor.
        given: terms that the fine-tune brings itself; the recipe has no say there.
        record: the manifest's `recipe`; that of `recipe` if None.
        evidence: of a calibration run; None without one.
        quantization: of the base that differences are taken to; None for the base as it is.
        delta: float32 differences that the fine-tune's tensors are a rounding of, by name; None where
            a tensor is all that there is.
        quality: the manifest's `quality`, what the judge finds left out.
        judge: measures the packed delta; None without calibration data.
        shared: where given terms read what they share with other deltas.
        device: where codecs run whose cost is arithmetic.
    """

    source: NamedBase
    target: TensorSource
    companions: Mapping[str, Path]
    recipe: Recipe
    accept: frozenset[str] = frozenset()
    command: str = ""
    progress: OnProgress = ignore
    given: Given = nothing_given
    record: Mapping[str, Any] | None = None
    evidence: EvidenceSource | None = None
    quantization: Quantization | None = None
    delta: Callable[[str], torch.Tensor | None] = nothing_given
    quality: Mapping[str, Any] = field(default_factory=dict)
    judge: Judge | None = None
    shared: SharedSource | None = None
    device: torch.device = CPU

    @property
    def resumable(self) -> bool:
        """Whether inputs and settings can be told apart from another run's by what lies on disk."""
        return isinstance(self.target, Checkpoint) and self.evidence is None


def pack(
    job: Job,
    out: str | Path,
    *,
    overwrite: bool = False,
    limits: Limits | None = None,
    fresh: bool = False,
) -> PackReport:
    """Write a delta repo, the one way in which they are made.

    Args:
        job: what is packed, and how.
        out: the delta repo.
        overwrite: replace an existing one.
        limits: how much of the machine to take; one tensor at a time, no bound of memory, if None.
        fresh: start over, even if an earlier run with the same inputs was cut short.

    Raises:
        DeltafoldError: whatever is wrong, before anything stands under `out`.
    """
    limits = limits or Limits()
    if job.evidence is not None:
        # There is one model to run: threads would load it twice, and pass each other by.
        limits = replace(limits, jobs=1)
    run = Run(job, limits)
    structure = compare(job.source, job.target, job.accept)
    inputs = (job.source.folder, job.target.reference.folder)
    tokenizer = check_tokenizer(*inputs, accepted="tokenizer" in job.accept)
    run.check()
    _refuse_quantised_budget(job)
    if job.recipe.fit is not None:
        raise DeltafoldError(
            "bad-argument",
            "this recipe also fits scales, which only packing a fine-tune with calibration data does.",
            fix="deltafold compress --recipe FILE --calibrate FILE, or take `fit` out",
        )
    run.check_room()
    plan: Plan | None = None
    resume = job.resumable and not fresh
    with Staging(Path(out), overwrite=overwrite, inputs=inputs, resume=resume) as staging:
        staging.keep = job.resumable
        if job.recipe.budget is not None:
            plan = plan_of(job)
            quality = {**job.quality, "plan": plan.evidence()}
            run = Run(replace(job, recipe=plan.recipe, quality=quality), limits)
        run.survey()
        manifest, stats = run.write(structure, staging.folder, tokenizer=tokenizer)
        repo = DeltaRepo.open(staging.folder)
        check_payload(repo, job.progress, limits.jobs, MemoryBudget(limits.room()))
        if job.judge is not None:
            manifest = record_quality(staging.folder, judged(job, repo))
        staging.publish()
    there = frozenset(run.coded_there()) & set(stats)
    return PackReport(Path(out), manifest, stats, plan, run.resumed, str(job.device), len(there))


def _refuse_quantised_budget(job: Job) -> None:
    if job.recipe.budget is not None and job.quantization is not None:
        raise DeltafoldError(
            "bad-argument",
            "a budget is planned for differences to the base as it is, not to a quantised one.",
            fix="leave --against dequantized out, or choose the codecs yourself",
        )
