"""Packing: a base, a fine-tune and a recipe in; a delta repo out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from deltafold.compress import dtypes
from deltafold.compress.card import write_card, write_tensor_table
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.companions import check_tokenizer, copy_files, named
from deltafold.compress.encode import (
    TensorStats,
    check_exact,
    encode_tensor,
    manifest_entry,
    measure,
)
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.evidence import EvidenceSource, check_needs
from deltafold.compress.fingerprint import Digests, TensorDigest, digest_source, fingerprint
from deltafold.compress.manifest import (
    BASE_TENSORS_NAME,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Origin,
    TensorEntry,
    Totals,
    is_evidence,
)
from deltafold.compress.payload import payload_key
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.recipe import Recipe
from deltafold.compress.release import version
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.shards import ShardWriter
from deltafold.compress.source import open_variant
from deltafold.compress.spec import spec_of
from deltafold.compress.staging import Staging
from deltafold.compress.structure import Structure, compare
from deltafold.compress.terms import Encoded, SharedSource
from deltafold.compress.verify import check_payload

#: The terms of a tensor that need no encoder, and the float32 delta that they stand for; or None.
Given: TypeAlias = Callable[[str], tuple[list[Encoded], torch.Tensor] | None]


@dataclass(frozen=True)
class PackReport:
    """The outcome of a packing run; sizes in bytes."""

    out: Path
    manifest: Manifest
    stats: dict[str, TensorStats] = field(default_factory=dict)

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
    command: str = "",
    evidence: EvidenceSource | None = None,
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
        command: recorded in the manifest and card.
        evidence: of a calibration run, for methods that need one.
        progress: called after every tensor.

    Raises:
        DeltafoldError: whatever is wrong, before anything stands under `out`.
    """
    source = Checkpoint.open(base)
    target = open_variant(variant, source)
    companions = named(target.reference.folder)
    return pack(
        Job(
            source,
            target,
            companions,
            recipe or Recipe(),
            frozenset(accept),
            command,
            progress,
            evidence=evidence,
        ),
        out,
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class Job:
    """What is packed, and how.

    Attributes:
        source: the base.
        target: the fine-tune.
        companions: the small files of the delta repo: name there -> file to copy.
        recipe: which codec for which tensor.
        accept: differences in structure that are meant.
        command: recorded in the manifest and card.
        progress: called after every tensor.
        given: terms that the fine-tune brings itself; the recipe has no say there.
        record: the manifest's `recipe`; that of `recipe` if None.
        evidence: of a calibration run; None without one.
        shared: where given terms read what they share with other deltas.
    """

    source: Checkpoint
    target: TensorSource
    companions: Mapping[str, Path]
    recipe: Recipe
    accept: frozenset[str] = frozenset()
    command: str = ""
    progress: OnProgress = ignore
    given: Given = lambda name: None
    record: Mapping[str, Any] | None = None
    evidence: EvidenceSource | None = None
    shared: SharedSource | None = None


def pack(job: Job, out: str | Path, *, overwrite: bool = False) -> PackReport:
    """Write a delta repo, the one way in which they are made.

    Raises:
        DeltafoldError: whatever is wrong, before anything stands under `out`.
    """
    run = _Run(job)
    structure = compare(job.source, job.target, job.accept)
    inputs = (job.source.folder, job.target.reference.folder)
    tokenizer = check_tokenizer(*inputs, accepted="tokenizer" in job.accept)
    run.check_patterns()
    run.check_needs()
    with Staging(Path(out), overwrite=overwrite, inputs=inputs) as staging:
        manifest, stats = run.write(structure, staging.folder, tokenizer)
        check_payload(DeltaRepo.open(staging.folder), job.progress)
        staging.publish()
    return PackReport(Path(out), manifest, stats)


@dataclass
class _Run:
    """One packing run: what to do, and what has come of it so far."""

    job: Job
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    stats: dict[str, TensorStats] = field(default_factory=dict)

    def check_patterns(self) -> None:
        target = self.job.target
        unused = self.job.recipe.unused(target.names())
        if unused:
            raise DeltafoldError(
                "bad-recipe",
                f"no tensor of {target.reference.name} matches {unused[0]!r}.",
                facts=[("tensors", name_some(target.names(), len(target.names())))],
                fix="a pattern is matched with the whole name: begin or end it with *",
            )

    def check_needs(self) -> None:
        """Refuse a recipe whose needs nobody meets before the first byte is hashed."""
        for name in self.job.target.names():
            spec = self.job.target.spec(name)
            floating = spec.dtype in dtypes.FLOATS
            method = self.job.recipe.method_for(name, spec.shape, floating=floating)
            check_needs(method.needs, self.job.evidence, spec_of(method))

    def write(
        self, structure: Structure, folder: Path, tokenizer: bool
    ) -> tuple[Manifest, dict[str, TensorStats]]:
        job, target = self.job, self.job.target
        base_digests = self._hash(job.source)
        variant_digests = self._hash(target)
        writer = ShardWriter(folder, "delta", {"format": FORMAT, "format_version": FORMAT_VERSION})
        names = target.names()
        for done, name in enumerate(names, 1):
            self._tensor(name, base_digests, variant_digests, writer)
            spec = target.spec(name)
            nbytes = math.prod(spec.shape) * dtypes.TORCH[spec.dtype].itemsize
            job.progress(Progress("pack", name, done, len(names), nbytes))
        assert len(self.entries) + len(self.unchanged) == len(names)
        payload = writer.finish()
        _write_base_tensors(folder, base_digests)
        copy_files(job.companions, folder)
        accepted = [*structure.accepted, *(["tokenizer"] if tokenizer else [])]
        manifest = self._manifest(
            folder, payload, base_digests, variant_digests, accepted, structure
        )
        write_tensor_table(folder, manifest, self.stats)
        write_card(folder, manifest, job.source.reference)
        _write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
        return manifest, self.stats

    def _hash(self, source: TensorSource) -> dict[str, TensorDigest]:
        total, done = len(source.names()), 0

        def count(name: str, nbytes: int) -> None:
            nonlocal done
            done += 1
            self.job.progress(Progress("hash", name, done, total, nbytes))

        return digest_source(source, count)

    def _tensor(
        self, name: str, base_digests: Digests, variant_digests: Digests, writer: ShardWriter
    ) -> None:
        source, given = self.job.source, self.job.given(name)
        # A given difference may be too small to survive rounding; it still counts when it is served.
        if given is None and base_digests.get(name) == variant_digests[name]:
            self.unchanged.append(name)
            return
        value = self.job.target.tensor(name)
        base = source.tensor(name) if name in source else None
        encoded, delta = given or encode_tensor(
            name, value, base, self.job.recipe, self.job.evidence
        )
        check_exact(name, encoded, value, base, variant_digests[name])
        for index, (_, parts) in enumerate(encoded):
            for key, part in parts.items():
                writer.add(payload_key(name, index, key), part)
        self.stats[name] = measure(name, encoded, delta, base, self.job.shared)
        self.entries[name] = manifest_entry(
            name, value, base, encoded, variant_digests[name], self.stats[name].error
        )

    def _manifest(
        self,
        folder: Path,
        payload: list[Path],
        base_digests: Digests,
        variant_digests: Digests,
        accepted: list[str],
        structure: Structure,
    ) -> Manifest:
        files = _file_entries(folder, {p.name for p in payload if p.suffix == ".safetensors"})
        variant_bytes = sum(
            math.prod(d.shape) * dtypes.TORCH[d.dtype].itemsize for d in variant_digests.values()
        )
        delta_bytes = sum(f.bytes for n, f in files.items() if not is_evidence(n))
        covered = len(self.entries) + len(self.unchanged)
        record = self.job.recipe.to_json() if self.job.record is None else dict(self.job.record)
        draft = Manifest(
            delta_id="sha256:" + "0" * 64,
            base=_origin(self.job.source, base_digests),
            variant=_origin(self.job.target, variant_digests),
            created_by=f"deltafold {version()}",
            command=self.job.command,
            recipe=record,
            tensors=self.entries,
            unchanged=tuple(self.unchanged),
            absent=tuple(structure.absent),
            accepted=tuple(accepted),
            files=files,
            totals=Totals(
                variant_bytes=variant_bytes,
                delta_bytes=delta_bytes,
                payload_bytes=sum(e.bytes for e in self.entries.values()),
                ratio=delta_bytes / max(variant_bytes, 1),
                coverage=covered / max(len(variant_digests), 1),
            ),
        )
        return draft.model_copy(update={"delta_id": draft.content_digest()})


def _origin(source: TensorSource, digests: Digests) -> Origin:
    reference = source.reference
    return Origin(
        name=reference.name, revision=reference.revision, fingerprint=fingerprint(digests)
    )


def _file_entries(folder: Path, payload: set[str]) -> dict[str, FileEntry]:
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        digest = None if name in payload else hashlib.sha256(path.read_bytes()).hexdigest()
        entries[name] = FileEntry(bytes=path.stat().st_size, sha256=digest)
    return entries


def _write_base_tensors(folder: Path, digests: Digests) -> None:
    data = {n: [d.dtype, list(d.shape), d.sha256] for n, d in sorted(digests.items())}
    _write_json(folder / BASE_TENSORS_NAME, data, indent=None)


def _write_json(path: Path, data: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(data, indent=indent) + "\n", "utf-8")
