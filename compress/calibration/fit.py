"""Scale distillation: train the scales of a delta until its model's logits are the fine-tune's.

Liu et al., "BitDelta" (arXiv 2402.10193), section 3.1: minimise the mean squared difference of the
logits over the scales, everything else fixed; Adam with rate 1e-4, betas .9 and .999, a cosine down to
zero; 200 steps of four rows of 128 tokens. Here the scales of every term that has some are trained,
and rows come in the file's order. The authors' released code trains all other parameters along
(embeddings, norms, head) with AdamW's weight decay, and stores them too: another artifact than the
paper describes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltafold.compress.calibration.batches import Batch, in_batches
from deltafold.compress.calibration.data import CalibrationSet
from deltafold.compress.calibration.model import ParameterMap, load_delta, load_source
from deltafold.compress.calibration.quality import batch_logits, compare, predictions
from deltafold.compress.calibration.trainable import FactoredTensor, TrainableTensor
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.companions import named
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import EvidenceSource
from deltafold.compress.fitting import LogitFit
from deltafold.compress.memory import resident
from deltafold.compress.model_memory import fitting_bytes, on_cpu
from deltafold.compress.naming import NamedBase
from deltafold.compress.pipeline import Job, PackReport, compress_checkpoint, pack
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.recipe import Recipe
from deltafold.compress.repo import DeltaRepo, pad_rows
from deltafold.compress.sizes import human, parse_size
from deltafold.compress.source import open_variant
from deltafold.compress.staging import Staging
from deltafold.compress.terms import Context, Encoded


def compress_and_fit(
    base: str | Path,
    variant: str | Path,
    out: str | Path,
    data: CalibrationSet,
    *,
    fit: LogitFit | None = None,
    recipe: Recipe | None = None,
    accept: Collection[str] = (),
    overwrite: bool = False,
    command: str = "",
    evidence: EvidenceSource | None = None,
    quality: Mapping[str, Any] | None = None,
    device: str = "cpu",
    jobs: int = 1,
    max_memory: int | str | None = None,
    progress: OnProgress = ignore,
) -> PackReport:
    """`compress_checkpoint`, then `fit_scales`; nothing stands at `out` before both are done.

    Scales are fitted as `fit` says, or else the recipe.
    """
    recipe = recipe or Recipe()
    fit, recipe = fit or recipe.fit, replace(recipe, fit=None)
    place = Path(out)
    Staging(place, overwrite=overwrite)  # refuses what exists before any work
    if on_cpu(device):
        _check_memory(open_variant(variant, Checkpoint.open(base)), max_memory)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fit-", dir=place.parent) as folder:
        first = Path(folder) / place.name
        compress_checkpoint(
            base,
            variant,
            first,
            recipe=recipe,
            accept=accept,
            evidence=evidence,
            quality=quality,
            jobs=jobs,
            max_memory=max_memory,
            device=device,
            progress=progress,
        )
        return fit_scales(
            first,
            base,
            variant,
            place,
            data,
            fit=fit,
            overwrite=overwrite,
            command=command,
            device=device,
            progress=progress,
        )


def _check_memory(target: TensorSource, bound: int | str | None) -> None:
    """Raises `not-enough-memory` where the models alone would take more than a run may."""
    limit = parse_size(bound, "--max-memory 4GiB") if isinstance(bound, str) else bound
    needed = resident() + fitting_bytes(target)
    if limit is not None and needed > limit:
        raise DeltafoldError(
            "not-enough-memory",
            "scales cannot be fitted within the memory that this run may take.",
            facts=[
                ("bound", human(limit)),
                ("needed", f"{human(needed)}, activations not counted"),
            ],
            fix="raise --max-memory, run the models on --device cuda, or leave --fit-scales out",
        )


def fit_scales(
    delta: str | Path,
    base: str | Path,
    variant: str | Path,
    out: str | Path,
    data: CalibrationSet,
    *,
    fit: LogitFit | None = None,
    overwrite: bool = False,
    command: str = "",
    device: str = "cpu",
    progress: OnProgress = ignore,
) -> PackReport:
    """Write a delta again with scales that bring its logits closer to the fine-tune's.

    Takes the memory of about six copies of the weights in float32, besides the activations of a step.
    Chance has no part in it. Should the logits end up farther away than before, the scales stay as they
    were; the manifest's `quality.fit` tells, and how many tensors were fitted and how many `left_out`,
    coded with loss by a codec that has no scales.

    Args:
        delta: the delta repo to improve.
        base: its base.
        variant: the fine-tune that it was packed from.
        out: the delta repo to write.
        data: what the models are run on.
        fit: how.
        overwrite: replace an existing `out`.
        command: recorded in the manifest; that of `delta` if empty.
        device: where the models run.
        progress: called after every step and tensor.

    Raises:
        DeltafoldError: `base-mismatch`; `bad-argument` where the delta is of another fine-tune or has
            no scales; `engine-unsupported` where the model fuses a tensor that has some.
    """
    options = fit or LogitFit()
    checkpoint, repo = Checkpoint.open(base), DeltaRepo.open(delta)
    source, target = repo.named(checkpoint), open_variant(variant, checkpoint)
    _check_variant(repo, target)
    student = _Student.open(source, repo, target, options, device)
    teacher = load_source(target, device=device)
    rows = data.windows(options.length)
    before = logit_error(teacher, student.logits, rows, options.batch, device)
    kl_before = compare(teacher, student.model, rows, batch=options.batch).kl
    _train(student, teacher, rows, options, device, progress)
    fitted, factors = student.stored(), student.factors()
    student.take(fitted)
    after = logit_error(teacher, student.logits, rows, options.batch, device)
    better = after < before
    student.settle()
    kl_after = compare(teacher, student.model, rows, batch=options.batch).kl
    found = {
        **options.record(),
        "data": rows.record(),
        "kept": "fitted" if better else "initial",
        "tensors": len(fitted),
        "left_out": student.left_out,
        **({"factors": factors} if factors else {}),
        "logit_mse": [before, after],
        "kl": [kl_before, kl_after],
    }
    kept = fitted if better else {}

    def given(name: str) -> tuple[list[Encoded], torch.Tensor] | None:
        if name not in repo.manifest.tensors:
            return None
        return kept.get(name) or repo.parts(name), _difference(source, target, name)

    record = {**repo.manifest.recipe, "fit": options.record()}
    job = Job(
        source,
        target,
        named(target.reference.folder),
        Recipe(),
        frozenset(repo.manifest.accepted),
        command or repo.manifest.command,
        progress,
        given=given,
        record=record,
        quality={**repo.manifest.quality, "fit": found},
    )
    return pack(job, out, overwrite=overwrite)


@dataclass
class _Student:
    """The model of a delta, some of whose weights are computed from scales at every step."""

    model: Any
    tensors: dict[str, TrainableTensor | FactoredTensor]
    parameters: dict[str, str]
    device: str
    #: Tensors that are coded with loss and have nothing to train.
    left_out: int = 0

    @classmethod
    def open(
        cls, source: NamedBase, repo: DeltaRepo, target: TensorSource, fit: LogitFit, device: str
    ) -> _Student:
        model = load_delta(source.checkpoint, repo, device=device).requires_grad_(False)
        found, parameters = ParameterMap(model, target), {}
        tensors: dict[str, TrainableTensor | FactoredTensor] = {}
        factors: list[torch.Tensor] = []
        left_out = 0
        for name in sorted(repo.manifest.tensors):
            shape = tuple(repo.entry(name).shape)
            base = pad_rows(source.tensor(name), shape) if name in source else None
            shared = factors if fit.what == "terms" else None
            trainable = _trainable(repo.parts(name), shape, Context(name, base), shared)
            if trainable is None or base is None:
                left_out += not repo.exact(name)
                continue
            parameter = found.find(name)
            if parameter is None:
                raise DeltafoldError(
                    "engine-unsupported",
                    f"the scales of {name} cannot be fitted: the model keeps it in another layout.",
                    fix=f"keep it out: --set '{name}=exact', or leave out --fit-scales",
                )
            tensors[name], parameters[name] = trainable, parameter
        if not tensors:
            raise DeltafoldError(
                "bad-argument",
                f"this delta has no {fit.what} to fit.",
                facts=[("codec", repo.manifest.codec_summary())],
                fix="fit codecs that have some: bitdelta, int",
            )
        return cls(model, tensors, parameters, device, left_out)

    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters that scales decide, by their names in the model."""
        return {
            parameter: self._weight(self.tensors[name])
            for name, parameter in self.parameters.items()
        }

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits float32 `[B, T, V]`; gradients flow to the scales."""
        weights = self.weights()

        def call(**inputs: Any) -> Any:
            return torch.func.functional_call(self.model, weights, kwargs=inputs)

        return batch_logits(call, batch)

    def factors(self) -> list[float]:
        """What each of a tensor's terms is multiplied by; empty where scales are trained."""
        found: list[float] = []
        for tensor in self.tensors.values():
            if isinstance(tensor, FactoredTensor) and len(tensor.encoded) > len(found):
                found = [factor.item() for factor in tensor.factors[: len(tensor.encoded)]]
        return found

    def stored(self) -> dict[str, list[Encoded]]:
        """All terms with their scales as they now are."""
        return {name: tensor.stored() for name, tensor in self.tensors.items()}

    def take(self, terms: Mapping[str, list[Encoded]]) -> None:
        """Go on with terms as they were stored."""
        for name, encoded in terms.items():
            tensor = self.tensors[name]
            factors: list[torch.Tensor] | None = None
            if isinstance(tensor, FactoredTensor):
                factors = []
            fresh = _trainable(encoded, tensor.shape, tensor.context, factors)
            assert fresh is not None
            self.tensors[name] = fresh

    @torch.no_grad()
    def settle(self) -> None:
        """Write the weights into the model."""
        for parameter, value in self.weights().items():
            self.model.get_parameter(parameter).copy_(value)

    def _weight(self, tensor: TrainableTensor | FactoredTensor) -> torch.Tensor:
        assert tensor.context.base is not None
        return (tensor.context.base.to(torch.float32) + tensor.decode()).to(self.device)


def _trainable(
    encoded: list[Encoded],
    shape: tuple[int, ...],
    context: Context,
    factors: list[torch.Tensor] | None,
) -> TrainableTensor | FactoredTensor | None:
    """A tensor with its scales as leaves, or with factors that tensors share."""
    if factors is None:
        return TrainableTensor.open(encoded, shape, context)
    return FactoredTensor.open(encoded, shape, context, factors)


def _train(
    student: _Student,
    teacher: Any,
    rows: CalibrationSet,
    options: LogitFit,
    device: str,
    progress: OnProgress,
) -> None:
    values = {id(v): v for tensor in student.tensors.values() for v in tensor.values.values()}
    optimizer = torch.optim.Adam(list(values.values()), lr=options.rate, betas=(0.9, 0.999))
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / options.steps))
    )
    batches = [batch.to(torch.device(device)) for batch in in_batches(rows.rows, options.batch)]
    for step in range(options.steps):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            wanted = batch_logits(teacher, batch)
        loss = _squares(student.logits(batch), wanted, batch).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        cosine.step()
        progress(Progress("fit", f"step {step + 1}", step + 1, options.steps, 0))


@torch.no_grad()
def logit_error(
    teacher: Any,
    student: Callable[[Batch], torch.Tensor],
    rows: CalibrationSet,
    batch: int,
    device: str,
) -> float:
    """Mean squared difference of all logits at the asked tokens of a set."""
    total, count = 0.0, 0
    for moved in (b.to(torch.device(device)) for b in in_batches(rows.rows, batch)):
        squares = _squares(student(moved), batch_logits(teacher, moved), moved)
        total += squares.sum(dtype=torch.float64).item()
        count += squares.numel()
    return total / count


def _squares(ours: torch.Tensor, wanted: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (predictions(ours, batch).logits - predictions(wanted, batch).logits).square()


def _check_variant(repo: DeltaRepo, target: TensorSource) -> None:
    for name, entry in repo.manifest.tensors.items():
        if name not in target.names() or target.sha256(name) != entry.sha256:
            raise DeltafoldError(
                "bad-argument",
                f"{repo.folder} was packed from another fine-tune than {target.reference.name}.",
                facts=[("first difference", name)],
                fix="give the fine-tune that the delta was made from",
            )


def _difference(source: NamedBase, target: TensorSource, name: str) -> torch.Tensor:
    value = target.tensor(name).to(torch.float32)
    base = pad_rows(source.tensor(name), tuple(value.shape)) if name in source else None
    return value if base is None else value - base.to(torch.float32)
