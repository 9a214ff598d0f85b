"""One packing run: every tensor coded, journalled, and put together to a delta repo's files."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deltafold.compress import dtypes
from deltafold.compress.card import write_card, write_tensor_table
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.coded import Sink, TensorStats
from deltafold.compress.companions import copy_files
from deltafold.compress.encode import difference
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.evidence import RunningSource, check_needs, follower
from deltafold.compress.fingerprint import Digests, TensorDigest, fingerprint
from deltafold.compress.inputs import Inputs
from deltafold.compress.journal import Journal, Place, Record, clear, is_journal
from deltafold.compress.limits import Limits, check_room, needs
from deltafold.compress.manifest import (
    BASE_TENSORS_NAME,
    FORMAT,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Origin,
    TensorEntry,
    Totals,
    is_evidence,
    version_for,
)
from deltafold.compress.memory import Timeline
from deltafold.compress.packing import code_all, stats_of
from deltafold.compress.payload import payload_key
from deltafold.compress.placing import description, runs_on_devices
from deltafold.compress.quantized import dequantized
from deltafold.compress.release import version
from deltafold.compress.safetensors_file import Deferred
from deltafold.compress.shards import ShardWriter
from deltafold.compress.spec import spec_of
from deltafold.compress.streaming import Coder
from deltafold.compress.structure import Structure
from deltafold.compress.survey import surveyed

if TYPE_CHECKING:
    from deltafold.compress.pipeline import Job
    from deltafold.compress.recipe import Recipe


#: Samples of memory, four a second at first: shorter runs have nothing to show.
_WORTH_DRAWING = 20


@dataclass
class Run:
    """One packing run: what to do, and what has come of it so far.

    Attributes:
        job: what is packed, and how.
        limits: how much of the machine it may take.
        recipe: the job's, once surveyed.
        resumed: tensors that an earlier run had finished.
    """

    job: Job
    limits: Limits = field(default_factory=Limits)
    recipe: Recipe = field(init=False)
    resumed: int = 0

    def __post_init__(self) -> None:
        self.recipe = self.job.recipe

    def check(self) -> None:
        """Refuse a recipe that fits nothing, or whose needs nobody meets, before any work."""
        self.check_patterns()
        target, recipe = self.job.target, self.job.recipe
        for name in target.names():
            spec = target.spec(name)
            method = recipe.method_for(name, spec.shape, floating=spec.dtype in dtypes.FLOATS)
            check_needs(method.needs, self.job.evidence, spec_of(method))

    def check_patterns(self) -> None:
        """Refuse a pattern that matches no tensor: most likely a typing mistake."""
        target, recipe = self.job.target, self.job.recipe
        unused = recipe.unused(target.names())
        if unused:
            raise DeltafoldError(
                "bad-recipe",
                f"no tensor of {target.reference.name} matches {unused[0]!r}.",
                facts=[("tensors", name_some(target.names(), len(target.names())))],
                fix="a pattern is matched with the whole name: begin or end it with *",
            )

    def check_room(self) -> None:
        """Refuse a bound of memory that a tensor does not fit, before any work."""
        job = self.job
        source = job.evidence
        model = source.upcoming_bytes() if isinstance(source, RunningSource) else 0
        coder = self._coder(_nowhere, {}, {})
        check_room(needs(coder, job.target.names(), job.recipe), self.limits, model)

    def survey(self) -> None:
        """Let edits that need it look at the whole model."""
        job = self.job
        self.recipe = surveyed(
            job.recipe,
            job.source,
            job.target,
            self._delta,
            evidence=job.evidence,
            given=job.given,
        )

    def _delta(self, name: str) -> torch.Tensor:
        known = self.job.delta(name)
        return (
            known
            if known is not None
            else difference(self.job.target.tensor(name), self._base(name))
        )

    def _base(self, name: str) -> torch.Tensor | None:
        """What a tensor's difference is taken to."""
        source, quantization = self.job.source, self.job.quantization
        if name not in source:
            return None
        if quantization is None or name not in quantization.tensors:
            return source.tensor(name)
        return dequantized(name, source.tensor(name), quantization.method)

    def write(
        self, structure: Structure, folder: Path, *, tokenizer: bool
    ) -> tuple[Manifest, dict[str, TensorStats]]:
        """Code every tensor and write all files of the delta.

        Args:
            structure: how the fine-tune's tensors relate to the base's.
            folder: where to write; an earlier run's journal may lie there.
            tokenizer: whether another tokenizer was accepted.
        """
        job = self.job
        clear(folder)
        inputs = Inputs(job.source, job.target)
        caches, identity = inputs.caches, self._identity()
        with Timeline() as timeline, Journal(folder, identity, inputs.stamps) as journal:
            if journal.stamps != inputs.stamps:
                journal.drop(
                    inputs.stale(journal.done, journal.stamps, job.progress), inputs.stamps
                )
            self.resumed = journal.resumed
            digests = self._code(journal, inputs)
            inputs.check()
            records = [journal.done[name] for name in sorted(job.target.names())]
            writer = self._payload(folder, journal, records)
        for cache, found in zip(caches, (job.source.by_own(digests[0]), digests[1]), strict=False):
            cache.remember(found)
        manifest = self._files(folder, writer, records, digests, structure, tokenizer)
        stats = {r.name: stats_of(r) for r in records if r.entry is not None}
        write_tensor_table(folder, manifest, stats)
        write_card(folder, manifest, job.source.reference, variant=job.target.reference.folder)
        _write_json(folder / MANIFEST_NAME, manifest.to_json())
        _write_timeline(folder, timeline)
        return manifest, stats

    def _code(self, journal: Journal, inputs: Inputs) -> tuple[Digests, Digests]:
        """Code what the journal lacks; the digests of base and fine-tune."""
        job = self.job
        follows = follower(job.evidence)
        known = [cache.known() for cache in inputs.caches]
        known[0] = job.source.named(known[0])
        coder = self._coder(journal.put, known[0], known[1] if len(known) > 1 else {})
        if follows:
            coder = replace(coder, settled=follows.settle)
        names = job.target.names()
        limits = Limits(1, self.limits.memory) if follows else self.limits
        order = follows.order(names) if follows else None
        code_all(coder, names, journal, limits, job.progress, order=order, check=inputs.check)
        variant = {n: str(journal.done[n].variant) for n in names}
        base = known[0] | {n: b for n in names if (b := journal.done[n].base) is not None}
        # What the fine-tune lacks is part of the base's fingerprint all the same.
        base |= {n: job.source.sha256(n) for n in job.source.names() if n not in base}
        return _digests(job.source, base), _digests(job.target, variant)

    def _coder(self, sink: Sink, base: dict[str, str], variant: dict[str, str]) -> Coder:
        """What codes the tensors; digests of base and fine-tune that are known need no hashing."""
        job = self.job
        return Coder(
            job.source,
            job.target,
            self.recipe,
            sink,
            base,
            known_target=variant,
            evidence=job.evidence,
            given=job.given,
            delta=job.delta,
            quantization=job.quantization,
            shared=job.shared,
            device=job.device,
        )

    def _payload(self, folder: Path, journal: Journal, records: list[Record]) -> list[Path]:
        """Put the parts into shards, in the order of names, terms and parts."""
        metadata = {"format": FORMAT, "format_version": self._version()}
        writer = ShardWriter(folder, "delta", metadata)
        for record in records:
            for number, places in enumerate(record.parts):
                for key, place in sorted(places.items()):
                    load = partial(journal.pieces, place)
                    deferred = Deferred(dtypes.TORCH[place.dtype], place.shape, load)
                    writer.add(payload_key(record.name, number, key), deferred)
        return writer.finish()

    def _files(
        self,
        folder: Path,
        payload: list[Path],
        records: list[Record],
        digests: tuple[Digests, Digests],
        structure: Structure,
        tokenizer: bool,
    ) -> Manifest:
        job = self.job
        base, variant = job.source.by_own(digests[0]), digests[1]
        _write_base_tensors(folder, base)
        copy_files(job.companions, folder)
        files = _file_entries(folder, {p.name for p in payload if p.suffix == ".safetensors"})
        entries = {
            r.name: TensorEntry.model_validate(r.entry) for r in records if r.entry is not None
        }
        unchanged = tuple(r.name for r in records if r.entry is None)
        variant_bytes = sum(
            math.prod(d.shape) * dtypes.TORCH[d.dtype].itemsize for d in variant.values()
        )
        delta_bytes = sum(f.bytes for n, f in files.items() if not is_evidence(n))
        draft = Manifest(
            format_version=self._version(),
            base_quantization=job.quantization,
            base_names=job.source.scheme,
            untied=job.source.untied or None,
            delta_id="sha256:" + "0" * 64,
            base=_origin(job.source, base),
            variant=_origin(job.target, variant),
            created_by=f"deltafold {version()}",
            command=job.command,
            recipe=job.recipe.to_json() if job.record is None else dict(job.record),
            tensors=entries,
            unchanged=unchanged,
            absent=tuple(structure.absent),
            accepted=(*structure.accepted, *(["tokenizer"] if tokenizer else [])),
            files=files,
            totals=Totals(
                variant_bytes=variant_bytes,
                delta_bytes=delta_bytes,
                payload_bytes=sum(e.bytes for e in entries.values()),
                ratio=delta_bytes / max(variant_bytes, 1),
                coverage=(len(entries) + len(unchanged)) / max(len(variant), 1),
            ),
            quality=dict(job.quality),
        )
        return draft.model_copy(update={"delta_id": draft.content_digest()})

    def coded_there(self) -> list[str]:
        """Tensors whose codec is at work on the job's device; none where that is the CPU."""
        job = self.job
        if job.device.type == "cpu":
            return []
        coder = self._coder(_nowhere, {}, {})
        names = [n for n in job.target.names() if n in job.source]
        return [n for n in names if coder.target.spec(n).shape and runs_on_devices(coder.method(n))]

    def _version(self) -> str:
        source = self.job.source
        return version_for(self.job.quantization, source.scheme, source.untied)

    def _identity(self) -> str:
        """What a journal belongs to: inputs but for their content, settings, and this version."""
        job = self.job
        if not job.resumable:
            return ""
        assert isinstance(job.target, Checkpoint)
        content = {
            "version": [version(), self._version()],
            "inputs": [_headers(s) for s in (job.source.checkpoint, job.target)],
            "recipe": self.recipe.to_json(),
            "accept": sorted(job.accept),
            "device": self.coded_there() and description(job.device),
            "quantization": None if job.quantization is None else job.quantization.model_dump(),
        }
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _nowhere(tensor: torch.Tensor) -> Place:
    raise AssertionError("nothing is coded here")


def _headers(source: Checkpoint) -> list[object]:
    return [str(source.folder), [[name, *source.spec(name)] for name in source.names()]]


def _digests(source: TensorSource, digests: dict[str, str]) -> dict[str, TensorDigest]:
    return {name: TensorDigest(*source.spec(name), digest) for name, digest in digests.items()}


def _origin(source: TensorSource, digests: Digests) -> Origin:
    reference = source.reference
    return Origin(
        name=reference.name, revision=reference.revision, fingerprint=fingerprint(digests)
    )


def _file_entries(folder: Path, payload: set[str]) -> dict[str, FileEntry]:
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not is_journal(p)):
        name = path.relative_to(folder).as_posix()
        digest = None if name in payload else hashlib.sha256(path.read_bytes()).hexdigest()
        entries[name] = FileEntry(bytes=path.stat().st_size, sha256=digest)
    return entries


def _write_base_tensors(folder: Path, digests: Digests) -> None:
    data = {n: [d.dtype, list(d.shape), d.sha256] for n, d in sorted(digests.items())}
    _write_json(folder / BASE_TENSORS_NAME, data, indent=None)


def _write_json(path: Path, data: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(data, indent=indent) + "\n", "utf-8")


def _write_timeline(folder: Path, timeline: Timeline) -> None:
    """Memory over time, of runs that took long enough to look at."""
    if len(timeline.samples) < _WORTH_DRAWING:
        return
    with (folder / "report" / "memory.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["seconds", "bytes"])
        table.writerows([f"{seconds:.2f}", nbytes] for seconds, nbytes in timeline.samples)
