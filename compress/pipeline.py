"""Packing: a base, a fine-tune and a recipe in; a delta repo out."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from deltafold.compress import dtypes
from deltafold.compress.card import write_card, write_tensor_table
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.companions import check_tokenizer, companion_files
from deltafold.compress.encode import (
    TensorStats,
    check_exact,
    encode_tensor,
    manifest_entry,
    measure,
)
from deltafold.compress.errors import DeltafoldError, name_some
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
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.recipe import Recipe
from deltafold.compress.release import version
from deltafold.compress.repo import DeltaRepo, payload_key
from deltafold.compress.shards import ShardWriter
from deltafold.compress.source import open_variant
from deltafold.compress.staging import Staging
from deltafold.compress.structure import Structure, compare
from deltafold.compress.verify import check_payload


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
        progress: called after every tensor.

    Raises:
        DeltafoldError: whatever is wrong, before anything stands under `out`.
    """
    run = _Run(recipe or Recipe(), frozenset(accept), command, progress)
    source = Checkpoint.open(base)
    target = open_variant(variant, source)
    structure = compare(source, target, run.accept)
    tokenizer = check_tokenizer(
        source.folder, target.reference.folder, accepted="tokenizer" in run.accept
    )
    run.check_patterns(target)
    inputs = (source.folder, target.reference.folder)
    with Staging(Path(out), overwrite=overwrite, inputs=inputs) as staging:
        manifest, stats = run.write(source, target, structure, staging.folder, tokenizer)
        check_payload(DeltaRepo.open(staging.folder), progress)
        staging.publish()
    return PackReport(Path(out), manifest, stats)


@dataclass
class _Run:
    """One packing run: the choices, and what has come of them so far."""

    recipe: Recipe
    accept: frozenset[str]
    command: str
    progress: OnProgress
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    stats: dict[str, TensorStats] = field(default_factory=dict)

    def check_patterns(self, target: TensorSource) -> None:
        unused = self.recipe.unused(target.names())
        if unused:
            raise DeltafoldError(
                "bad-recipe",
                f"no tensor of {target.reference.name} matches {unused[0]!r}.",
                facts=[("tensors", name_some(target.names(), len(target.names())))],
                fix="a pattern is matched with the whole name: begin or end it with *",
            )

    def write(
        self,
        source: Checkpoint,
        target: TensorSource,
        structure: Structure,
        folder: Path,
        tokenizer: bool,
    ) -> tuple[Manifest, dict[str, TensorStats]]:
        base_digests = self._hash(source)
        variant_digests = self._hash(target)
        writer = ShardWriter(folder, "delta", {"format": FORMAT, "format_version": FORMAT_VERSION})
        names = target.names()
        for done, name in enumerate(names, 1):
            self._tensor(name, source, target, base_digests, variant_digests, writer)
            spec = target.spec(name)
            nbytes = math.prod(spec.shape) * dtypes.TORCH[spec.dtype].itemsize
            self.progress(Progress("pack", name, done, len(names), nbytes))
        assert len(self.entries) + len(self.unchanged) == len(names)
        payload = writer.finish()
        _write_base_tensors(folder, base_digests)
        for path in companion_files(target.reference.folder):
            copy = folder / path.relative_to(target.reference.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        accepted = [*structure.accepted, *(["tokenizer"] if tokenizer else [])]
        manifest = self._manifest(
            folder, payload, source, target, base_digests, variant_digests, accepted, structure
        )
        write_tensor_table(folder, manifest, self.stats)
        write_card(folder, manifest, source.reference)
        _write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
        return manifest, self.stats

    def _hash(self, source: TensorSource) -> dict[str, TensorDigest]:
        total, done = len(source.names()), 0

        def count(name: str, nbytes: int) -> None:
            nonlocal done
            done += 1
            self.progress(Progress("hash", name, done, total, nbytes))

        return digest_source(source, count)

    def _tensor(
        self,
        name: str,
        source: Checkpoint,
        target: TensorSource,
        base_digests: Digests,
        variant_digests: Digests,
        writer: ShardWriter,
    ) -> None:
        if base_digests.get(name) == variant_digests[name]:
            self.unchanged.append(name)
            return
        value = target.tensor(name)
        base = source.tensor(name) if name in source else None
        encoded, delta = encode_tensor(name, value, base, self.recipe)
        check_exact(name, encoded, value, base, variant_digests[name])
        for index, (_, parts) in enumerate(encoded):
            for key, part in parts.items():
                writer.add(payload_key(name, index, key), part)
        self.stats[name] = measure(name, encoded, delta, base)
        self.entries[name] = manifest_entry(
            name, value, base, encoded, variant_digests[name], self.stats[name].error
        )

    def _manifest(
        self,
        folder: Path,
        payload: list[Path],
        source: Checkpoint,
        target: TensorSource,
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
        draft = Manifest(
            delta_id="sha256:" + "0" * 64,
            base=_origin(source, base_digests),
            variant=_origin(target, variant_digests),
            created_by=f"deltafold {version()}",
            command=self.command,
            recipe=self.recipe.to_json(),
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
