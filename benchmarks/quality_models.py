"""The demo's fine-tunes, packed and measured: what all parts of the quality benchmark share."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from deltafold.compress import (
    Checkpoint,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    merge_deltas,
    parse_spec,
    twin_deltas,
)
from deltafold.compress.calibration import (
    CalibratedEvidence,
    CalibrationSet,
    compare_logits,
    decoded_tensors,
    logits_of,
)
from deltafold.compress.calibration.batches import make_row
from deltafold.compress.calibration.evidence import AT_THE_FINE_TUNE, SafeExamples
from deltafold.compress.calibration.quality import Predictions
from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.families import parse_family
from deltafold.compress.families.pack import compress_family
from deltafold.compress.merges import Twin, parse_merge
from deltafold.compress.methods import LosslessMethod, SurveyedMethod
from deltafold.compress.methods.chain import codec_of
from deltafold.compress.naming import NamedBase
from deltafold.compress.references import Reference, ReferenceEvidence, open_references
from deltafold.compress.source import open_variant
from deltafold.server.demo import tasks, train
from deltafold.server.demo.tokenizer import prompt_of
from deltafold.server.demo.zoo import data_folder

_CALIBRATION_WORDS = 64
_SEED = 99
_BATCH = 128


@dataclass(frozen=True)
class Measured:
    """One fine-tune, changed in one way. `kl` in nats a token; `seconds` of the whole packing."""

    kl: float
    agreement: float
    accuracy: float
    loss: float
    rel_error: float
    bits: float = 32.0
    ratio: float = 2.0
    seconds: float = 0.0


@dataclass
class Task:
    """One of the demo's fine-tunes, bit for bit, with words to learn from and words to judge it by."""

    name: str
    folder: Path
    base: Checkpoint
    source: TensorSource
    calibration: CalibrationSet
    held_out: CalibrationSet
    others: tuple[Path, ...] = ()
    known: dict[tuple[str, ...], CalibratedEvidence] = field(default_factory=dict)

    def evidence(self, recipe: Recipe) -> CalibratedEvidence | ReferenceEvidence | None:
        """What the recipe needs; evidence of one kind is gathered once.

        Codecs that go by all fine-tunes of a base are told of the others. An unaligned model is one of
        the others too: what it stands for cannot be had here.
        """
        needs = recipe.needs()
        if isinstance(codec_of(recipe.default), SurveyedMethod):
            roles = {f"task:{path.name}": path for path in self.others}
            return ReferenceEvidence(open_references(roles, self.base, self.source))
        if not needs:
            return None
        if {"reference", "safe-activations"} & set(needs):
            roles = {"unaligned": self.others[0]} if self.others else {}
            references = open_references(roles, self.base, self.source)
            safe = SafeExamples(self.calibration, Reference.of(NamedBase(self.base)))
            return CalibratedEvidence(
                self.source, self.calibration, wanted=needs, references=references, safe=safe
            )
        if "sequential" in needs:
            return CalibratedEvidence(self.source, self.calibration, wanted=needs)
        if AT_THE_FINE_TUNE not in self.known:
            self.known[AT_THE_FINE_TUNE] = CalibratedEvidence(self.source, self.calibration)
        return self.known[AT_THE_FINE_TUNE]

    def fisher(self) -> CalibratedEvidence:
        """Gradients, for a budget."""
        return CalibratedEvidence(self.source, self.calibration, wanted=("gradients",))


class Bench:
    """The demo's base, some of its fine-tunes, and one loaded model that becomes each of them."""

    def __init__(self, names: Sequence[str], words: int) -> None:
        folder = data_folder()
        self.base = Checkpoint.open(folder / "base")
        self.model, self.tokenizer = train.load(folder / "base")
        folders = [folder / "zoo" / name for name in names]
        self.tasks = [self._task(f.name, f, folders, words) for f in folders]
        self.references = {task.name: self._reference(task) for task in self.tasks}

    def pack(self, task: Task, recipe: Recipe, **more: Any) -> tuple[Measured, DeltaRepo]:
        """Pack for real, read back, and measure."""
        evidence = more.pop("evidence", None) or task.evidence(recipe)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            report = compress_checkpoint(
                self.base.folder,
                task.folder,
                Path(folder) / "delta",
                recipe=recipe,
                evidence=evidence,
                **more,
            )
            seconds = time.perf_counter() - began
            repo = DeltaRepo.open(report.out)
            tensors = decoded_tensors(self.base, repo)
        totals = report.manifest.totals
        weights = sum(task.source.tensor(n).numel() for n in task.source.names())
        sizes = {"bits": totals.payload_bytes * 8 / weights, "ratio": totals.ratio}
        return self.measure(task, tensors, **sizes, seconds=seconds), repo

    def measure(self, task: Task, tensors: Mapping[str, torch.Tensor], **sizes: float) -> Measured:
        """A model, given by its tensors, beside the fine-tune."""
        self._become(tensors)
        said = list(logits_of(self.model, task.held_out, batch=_BATCH))
        found = compare_logits(self.references[task.name], said)
        return Measured(
            kl=found.kl,
            agreement=found.agreement,
            accuracy=_accuracy(said, task.held_out),
            loss=found.loss,
            rel_error=self._error(task, tensors),
            **sizes,
        )

    def tensors_of(self, source: TensorSource) -> dict[str, torch.Tensor]:
        """All tensors of a model, float32."""
        return {name: source.tensor(name).to(torch.float32) for name in source.names()}

    def _become(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.model.load_state_dict({n: t.to(torch.float32) for n, t in tensors.items()})

    def _error(self, task: Task, tensors: Mapping[str, torch.Tensor]) -> float:
        missed = moved = 0.0
        for name, tensor in tensors.items():
            own = task.source.tensor(name).to(torch.float64)
            missed += float((own - tensor.to(torch.float64)).square().sum())
            moved += float((own - self.base.tensor(name).to(torch.float64)).square().sum())
        return (missed / moved) ** 0.5

    def _reference(self, task: Task) -> list[Any]:
        self._become(self.tensors_of(task.source))
        return list(logits_of(self.model, task.held_out, batch=_BATCH))

    def family(self, spec: str) -> list[Measured]:
        """Pack all fine-tunes together; the shared tensors' bytes are split evenly.

        `spec` is of the family, ` --codec ` and the codec of what is shared behind it, or without one.
        """
        spec, _, codec = spec.partition(" --codec ")
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            report = compress_family(
                self.base.folder,
                [task.folder for task in self.tasks],
                Path(folder) / "zoo",
                method=parse_family(spec),
                codec=parse_spec(codec) if codec else None,
            )
            seconds = (time.perf_counter() - began) / len(self.tasks)
            found = []
            for task, (name, packed) in zip(self.tasks, report.packs.items(), strict=True):
                tensors = decoded_tensors(self.base, DeltaRepo.open(Path(folder) / "zoo" / name))
                totals, shared = packed.manifest.totals, report.family.bytes / len(self.tasks)
                weights = sum(task.source.tensor(n).numel() for n in task.source.names())
                sizes = {
                    "bits": (totals.payload_bytes + shared) * 8 / weights,
                    "ratio": (totals.delta_bytes + shared) / totals.variant_bytes,
                }
                found.append(self.measure(task, tensors, **sizes, seconds=seconds))
        return found

    def merge(self, spec: str) -> list[Measured]:
        """Merge all fine-tunes and see what is left of each; what all need is split evenly.

        A merge is one model for all tasks. Twin-Merging's is the shared delta with the task's own.
        """
        method = parse_merge(spec)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            for task in self.tasks:
                recipe = Recipe(default=LosslessMethod())
                compress_checkpoint(self.base.folder, task.folder, place / task.name, recipe=recipe)
            parents = [place / task.name for task in self.tasks]
            began = time.perf_counter()
            if isinstance(method, Twin):
                twin_deltas(self.base.folder, parents, place / "zoo", method=method)
                shared = DeltaRepo.open(place / "zoo" / "shared")
            else:
                merge_deltas(self.base.folder, parents, place / "merged", method=method)
                shared = DeltaRepo.open(place / "merged")
            seconds = (time.perf_counter() - began) / len(self.tasks)
            found = []
            for task in self.tasks:
                tensors = dict(decoded_tensors(self.base, shared))
                repos = [(shared, len(self.tasks))]
                if isinstance(method, Twin):
                    own = DeltaRepo.open(place / "zoo" / task.name)
                    repos.append((own, 1))
                    for name, tensor in decoded_tensors(self.base, own).items():
                        tensors[name] = tensors[name] + tensor - self.base.tensor(name)
                found.append(self.measure(task, tensors, **_split(task, repos), seconds=seconds))
        return found

    def _task(self, name: str, folder: Path, folders: Sequence[Path], words: int) -> Task:
        seen = list(dict.fromkeys(islice(tasks.words("train", _SEED), 2 * _CALIBRATION_WORDS)))
        held_out = tasks.held_out_words(words)
        return Task(
            name,
            folder,
            self.base,
            open_variant(folder, self.base),
            self._rows(name, seen[:_CALIBRATION_WORDS]),
            self._rows(name, held_out),
            tuple(path for path in folders if path != folder),
        )

    def _rows(self, task: str, words: Sequence[str]) -> CalibrationSet:
        ids = self.tokenizer.get_vocab()
        rows = []
        for word in words:
            prompt = [self.tokenizer.bos_token_id, *(ids[c] for c in prompt_of(word))]
            answer = [*(ids[c] for c in tasks.apply(task, word)), self.tokenizer.eos_token_id]
            rows.append(make_row([*prompt, *answer], len(prompt)))
        return CalibrationSet("demo words", tuple(rows), answers=True)


def _split(task: Task, repos: Sequence[tuple[DeltaRepo, int]]) -> dict[str, float]:
    """Size of deltas that so many tasks share each, for one of them."""
    weights = sum(task.source.tensor(n).numel() for n in task.source.names())
    payload = sum(repo.manifest.totals.payload_bytes / users for repo, users in repos)
    nbytes = sum(repo.manifest.totals.delta_bytes / users for repo, users in repos)
    variant = repos[0][0].manifest.totals.variant_bytes
    return {"bits": payload * 8 / weights, "ratio": nbytes / variant}


def _accuracy(said: Sequence[Predictions], data: CalibrationSet) -> float:
    """Share of words that greedy decoding answers right.

    It does where every token of the right answer is the likeliest one after those before it.
    """
    right = torch.cat([p.logits.argmax(dim=1) == p.targets for p in said])
    answers = right.split([row.predicted for row in data.rows])
    return sum(bool(answer.all()) for answer in answers) / len(answers)
