"""Packing: a base, a fine-tune and a recipe in; a delta repo out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
    difference,
    encode_tensor,
    manifest_entry,
    measure,
)
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.evidence import EvidenceSource, SequentialSource, check_needs
from deltafold.compress.fingerprint import Digests, TensorDigest, digest_source, fingerprint
from deltafold.compress.manifest import (
    BASE_TENSORS_NAME,
    FORMAT,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Origin,
    Quantization,
    TensorEntry,
    Totals,
    is_evidence,
    version_for,
)
from deltafold.compress.naming import NamedBase
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.quantized import dequantized, quantization_of
from deltafold.compress.recipe import Recipe
from deltafold.compress.release import version
from deltafold.compress.repo import DeltaRepo, pad_rows, payload_key
from deltafold.compress.shards import ShardWriter
from deltafold.compress.source import open_variant
from deltafold.compress.spec import spec_of
from deltafold.compress.staging import Staging
from deltafold.compress.structure import Structure, compare
from deltafold.compress.survey import surveyed
from deltafold.compress.terms import Context, Encoded, is_exact
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
    base_quantization: str | None = None,
    command: str = "",
    evidence: EvidenceSource | None = None,
    quality: Mapping[str, Any] | None = None,
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
        progress: called after every tensor.

    Raises:
        DeltafoldError: whatever is wrong, before anything stands under `out`.
    """
    checkpoint = Checkpoint.open(base)
    target = open_variant(variant, checkpoint)
    source = NamedBase.of(checkpoint, target)
    companions = named(target.reference.folder)
    quantization = quantization_of(source, base_quantization) if base_quantization else None
    job = Job(
        source,
        target,
        companions,
        recipe or Recipe(),
        frozenset(accept),
        command,
        progress,
        evidence=evidence,
        quantization=quantization,
        quality=quality or {},
    )
    return pack(job, out, overwrite=overwrite)


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
        quality: the manifest's `quality`.
    """

    source: NamedBase
    target: TensorSource
    companions: Mapping[str, Path]
    recipe: Recipe
    accept: frozenset[str] = frozenset()
    command: str = ""
    progress: OnProgress = ignore
    given: Given = lambda name: None
    record: Mapping[str, Any] | None = None
    evidence: EvidenceSource | None = None
    quantization: Quantization | None = None
    delta: Callable[[str], torch.Tensor | None] = lambda name: None
    quality: Mapping[str, Any] = field(default_factory=dict)


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
    run.survey()
    with Staging(Path(out), overwrite=overwrite, inputs=inputs) as staging:
        manifest, stats = run.write(structure, staging.folder, tokenizer)
        check_payload(DeltaRepo.open(staging.folder), job.progress)
        staging.publish()
    return PackReport(Path(out), manifest, stats)


@dataclass
class _Run:
    """One packing run: what to do, and what has come of it so far."""

    job: Job
    recipe: Recipe = field(init=False)
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    stats: dict[str, TensorStats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe = self.job.recipe

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
        if known is not None:
            return known
        return difference(self.job.target.tensor(name), self._base(name))

    def write(
        self, structure: Structure, folder: Path, tokenizer: bool
    ) -> tuple[Manifest, dict[str, TensorStats]]:
        job, target = self.job, self.job.target
        base_digests = self._hash(job.source)
        variant_digests = self._hash(target)
        metadata = {"format": FORMAT, "format_version": self._version()}
        writer = ShardWriter(folder, "delta", metadata)
        names, follower = target.names(), self._follower()
        for done, name in enumerate(follower.order(names) if follower else names, 1):
            self._tensor(name, base_digests, variant_digests, writer)
            spec = target.spec(name)
            nbytes = math.prod(spec.shape) * dtypes.TORCH[spec.dtype].itemsize
            job.progress(Progress("pack", name, done, len(names), nbytes))
        assert len(self.entries) + len(self.unchanged) == len(names)
        payload = writer.finish()
        _write_base_tensors(folder, job.source.by_own(base_digests))
        copy_files(job.companions, folder)
        accepted = [*structure.accepted, *(["tokenizer"] if tokenizer else [])]
        manifest = self._manifest(
            folder, payload, base_digests, variant_digests, accepted, structure
        )
        write_tensor_table(folder, manifest, self.stats)
        write_card(folder, manifest, job.source.reference)
        _write_json(folder / MANIFEST_NAME, manifest.to_json())
        return manifest, self.stats

    def _version(self) -> str:
        return version_for(self.job.quantization, self.job.source.scheme)

    def _follower(self) -> SequentialSource | None:
        source = self.job.evidence
        wanted = source is not None and "sequential" in source.provides
        return source if wanted and isinstance(source, SequentialSource) else None

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
        given, known = self.job.given(name), self.job.delta(name)
        # A given difference may be too small to survive rounding; it still counts when it is served.
        # A quantised tensor differs from its own original.
        differs = given is not None or known is not None or name in self._quantised
        if not differs and base_digests.get(name) == variant_digests[name]:
            self.unchanged.append(name)
            return
        value, base = self.job.target.tensor(name), self._base(name)
        encoded, delta = given or encode_tensor(
            name, value, base, self.recipe, self.job.evidence, known
        )
        check_exact(name, encoded, value, base, variant_digests[name])
        if follower := self._follower():
            follower.settle(name, _settled(name, encoded, value, base))
        for index, (_, parts) in enumerate(encoded):
            for key, part in parts.items():
                writer.add(payload_key(name, index, key), part)
        self.stats[name] = measure(name, encoded, delta, base)
        self.entries[name] = manifest_entry(
            name, value, base, encoded, variant_digests[name], self.stats[name].error
        )

    @cached_property
    def _quantised(self) -> frozenset[str]:
        quantization = self.job.quantization
        return frozenset(quantization.tensors if quantization else ())

    def _base(self, name: str) -> torch.Tensor | None:
        """What a tensor's difference is taken to."""
        source, quantization = self.job.source, self.job.quantization
        if name not in source:
            return None
        if quantization is None or name not in self._quantised:
            return source.tensor(name)
        return dequantized(name, source.tensor(name), quantization.method)

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
            format_version=self._version(),
            base_quantization=self.job.quantization,
            base_names=self.job.source.scheme,
            delta_id="sha256:" + "0" * 64,
            base=_origin(self.job.source, self.job.source.by_own(base_digests)),
            variant=_origin(self.job.target, variant_digests),
            created_by=f"deltafold {version()}",
            command=self.job.command,
            recipe=record,
            tensors=dict(sorted(self.entries.items())),
            unchanged=tuple(sorted(self.unchanged)),
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
            quality=dict(self.job.quality),
        )
        return draft.model_copy(update={"delta_id": draft.content_digest()})


def _settled(
    name: str, encoded: list[Encoded], value: torch.Tensor, base: torch.Tensor | None
) -> torch.Tensor:
    """What the compressed model holds in place of a tensor, float32."""
    if base is None or is_exact(encoded[0].term):
        return value.to(torch.float32)
    shape = tuple(value.shape)
    padded = pad_rows(base, shape)
    assert padded is not None
    context = Context(name, padded)
    return sum((t.decode(p, shape, context) for t, p in encoded), padded.to(torch.float32))


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
