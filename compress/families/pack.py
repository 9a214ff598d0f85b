"""Packing several fine-tunes of one base together: one family, and a delta for each."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.companions import check_tokenizer, named
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.evidence import check_needs
from deltafold.compress.families.base import FamilyMethod
from deltafold.compress.family import (
    FOLDER,
    FORMAT,
    FORMAT_VERSION,
    NAME,
    Family,
    FamilyManifest,
    SharedEntry,
)
from deltafold.compress.fingerprint import digest_source, fingerprint
from deltafold.compress.manifest import FileEntry
from deltafold.compress.methods import Method
from deltafold.compress.naming import NamedBase
from deltafold.compress.payload import payload_digest, payload_key
from deltafold.compress.pipeline import Job, PackReport, pack
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.recipe import Recipe
from deltafold.compress.release import version
from deltafold.compress.shards import ShardWriter
from deltafold.compress.source import open_variant
from deltafold.compress.spec import spec_of
from deltafold.compress.staging import Staging
from deltafold.compress.structure import compare
from deltafold.compress.terms import (
    Context,
    Dense,
    Encoded,
    Shared,
    config_of,
    rows_and_columns,
)


@dataclass(frozen=True)
class FamilyReport:
    """The outcome of packing a family; sizes in bytes."""

    out: Path
    family: FamilyManifest
    packs: dict[str, PackReport]

    @property
    def delta_bytes(self) -> int:
        """Of all deltas, without what they share."""
        return sum(p.manifest.totals.delta_bytes for p in self.packs.values())

    @property
    def ratio(self) -> float:
        """Deltas and what they share, over all fine-tunes."""
        total = sum(p.manifest.totals.variant_bytes for p in self.packs.values())
        return (self.delta_bytes + self.family.bytes) / max(total, 1)


def compress_family(
    base: str | Path,
    variants: Sequence[str | Path],
    out: str | Path,
    *,
    method: FamilyMethod,
    codec: Method | None = None,
    names: Sequence[str] = (),
    recipe: Recipe | None = None,
    accept: Collection[str] = (),
    overwrite: bool = False,
    command: str = "",
    progress: OnProgress = ignore,
) -> FamilyReport:
    """Pack several fine-tunes of one base so that they share tensors.

    Shared are floating-point tensors of two dimensions or more that at least two fine-tunes change and
    all have in the base's shape. Everything else, and what an override of the recipe names, is packed
    as `compress_checkpoint` does it. One tensor of all fine-tunes is in memory at a time.

    Args:
        base: folder or hub id of the base checkpoint.
        variants: two fine-tunes or more: checkpoints, or lossless delta repos.
        out: the zoo; a delta for each variant and one folder under `.families` are written there, all
            of them or none.
        method: what is shared, and how.
        codec: how the shared tensors are stored; None for float16 numbers.
        names: the deltas' names in the zoo; the variants' own by default.
        recipe: for tensors that are not shared.
        accept: differences in structure that are meant, see `structure.ACCEPTABLE`.
        overwrite: replace deltas of these names.
        command: recorded in the manifests.
        progress: called after every tensor.

    Raises:
        DeltafoldError: whatever is wrong, before anything stands in the zoo.
    """
    source = Checkpoint.open(base)
    targets = [open_variant(variant, source) for variant in variants]
    chosen = _names(names, targets)
    zoo, recipe = Path(out), recipe or Recipe()
    _check(source, targets, chosen, recipe, codec, accept)
    inputs = [source.folder, *(t.reference.folder for t in targets)]
    for name in chosen:
        Staging(zoo / name, overwrite=overwrite, inputs=inputs)
    with Staging(zoo / ".family", inputs=inputs) as staging:
        run = _Run(source, targets, chosen, method, codec, recipe, progress)
        family = run.write_family(staging.folder)
        packs = {
            name: replace(
                pack(run.job(i, family, frozenset(accept), command), staging.folder / name),
                out=zoo / name,
            )
            for i, name in enumerate(chosen)
        }
        _move(staging.folder, zoo, family, chosen, overwrite)
    return FamilyReport(zoo, family.manifest, packs)


@dataclass
class _Run:
    """One packing run: what to do, and what the family's pass has found."""

    source: Checkpoint
    targets: list[TensorSource]
    names: list[str]
    method: FamilyMethod
    codec: Method | None
    recipe: Recipe
    progress: OnProgress
    entries: dict[str, SharedEntry] = field(default_factory=dict)
    #: Sums over tensors of the two numbers whose ratio is a member's scale.
    own: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own = [0.0] * len(self.targets)
        self.taken = [0.0] * len(self.targets)
        self._have = [frozenset(target.names()) for target in self.targets]

    def write_family(self, folder: Path) -> Family:
        """Make every shared tensor and write the family under `folder`."""
        home = folder / FOLDER / "new"
        home.mkdir(parents=True)
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
        writer = ShardWriter(home, "family", metadata)
        names = [name for name in self.source.names() if self._fits(name)]
        for done, name in enumerate(names, 1):
            self._share(name, writer)
            shape = self.source.spec(name).shape
            nbytes = torch.Size(shape).numel() * 4
            self.progress(Progress("pack", name, done, len(names), nbytes))
        if not self.entries:
            raise DeltafoldError(
                "bad-argument",
                "these fine-tunes have no tensor to share.",
                fix="pack them one by one: deltafold compress",
            )
        draft = FamilyManifest(
            family_id="sha256:" + "0" * 64,
            base=fingerprint(digest_source(self.source)),
            method=spec_of(self.method),
            codec="float16" if self.codec is None else spec_of(self.codec),
            members=tuple(self.names),
            created_by=f"deltafold {version()}",
            tensors=self.entries,
            files={p.name: FileEntry(bytes=p.stat().st_size) for p in writer.finish()},
        )
        manifest = draft.model_copy(update={"family_id": draft.content_digest()})
        text = json.dumps(manifest.model_dump(mode="json"), indent=2)
        (home / NAME).write_text(f"{text}\n", "utf-8")
        place = home.with_name(manifest.family_id.removeprefix("sha256:"))
        home.rename(place)
        return Family(place)

    def job(self, member: int, family: Family, accept: frozenset[str], command: str) -> Job:
        """The packing job of one member."""
        target = self.targets[member]
        term = self.method.term(len(self.targets))
        scale = self.own[member] / self.taken[member] if self.taken[member] else 1.0

        def given(name: str) -> tuple[list[Encoded], torch.Tensor] | None:
            if name not in family.manifest.tensors:
                return None
            delta = self._delta(target, name)
            if not bool(delta.any()):
                return None
            own = Shared(
                family=family.digest,
                key=name,
                groups=term.groups,
                masked=term.masked,
                scale=scale,
            )
            context = Context(name, shared=shared)
            encoded = own.encode(delta, context)
            left = delta - encoded.term.decode(encoded.parts, tuple(delta.shape), context)
            return [encoded, *self.method.remainder(left, context)], delta

        # Coding and measuring ask for the same tensor one after the other.
        @lru_cache(maxsize=1)
        def shared(_: str, key: str) -> torch.Tensor:
            return family.tensor(key)

        return Job(
            NamedBase(self.source),
            target,
            named(target.reference.folder),
            self.recipe,
            accept,
            command,
            self.progress,
            given=given,
            record=self._record(family),
            shared=shared,
        )

    def _record(self, family: Family) -> dict[str, object]:
        manifest = family.manifest
        shared = {
            "id": manifest.family_id,
            "bytes": manifest.bytes,
            "codec": manifest.codec,
            "members": list(manifest.members),
        }
        rest = self.recipe.to_json()
        return {
            "default": manifest.method,
            "vectors": rest["vectors"],
            "tensors": rest["tensors"],
            "unshared": rest["default"],
            "family": shared,
        }

    def _fits(self, name: str) -> bool:
        spec = self.source.spec(name)
        if spec.dtype not in dtypes.FLOATS or len(spec.shape) < 2 or 0 in spec.shape:
            return False
        if any(fnmatchcase(name, pattern) for pattern, _ in self.recipe.overrides):
            return False
        return all(
            name in have and target.spec(name).shape == spec.shape
            for target, have in zip(self.targets, self._have, strict=True)
        )

    def _delta(self, target: TensorSource, name: str) -> torch.Tensor:
        """float32, of the tensor's own shape."""
        value = target.tensor(name).to(torch.float32) - self.source.tensor(name).to(torch.float32)
        if not bool(torch.isfinite(value).all()):
            raise DeltafoldError(
                "not-finite",
                f"{name} of {target.reference.name} has NaN or infinite entries, which a family "
                "cannot store.",
                fix=f"check the fine-tune, or keep this tensor as it is: --set '{name}=lossless'",
            )
        return value

    def _share(self, name: str, writer: ShardWriter) -> None:
        rows, columns = rows_and_columns(self.source.spec(name).shape)
        deltas = [self._delta(t, name).reshape(rows, columns) for t in self.targets]
        if sum(bool(delta.any()) for delta in deltas) < 2:
            return
        table = self.method.share(deltas)
        shape = (table.shape[0], table.shape[1])
        encoded = self._coded(name, table)
        for index, (_, parts) in enumerate(encoded):
            for key, part in parts.items():
                writer.add(payload_key(name, index, key), part)
        self.entries[name] = SharedEntry(
            shape=shape,
            terms=tuple(config_of(term) for term, _ in encoded),
            payload_sha256=payload_digest(parts for _, parts in encoded),
            bytes=sum(p.numel() * p.element_size() for _, ps in encoded for p in ps.values()),
        )
        self._measure(name, encoded, shape, deltas)

    def _coded(self, name: str, table: torch.Tensor) -> list[Encoded]:
        context = Context(name, variant=table)
        if self.codec is None:
            return [Dense(value_format="float16").encode(table, context)]
        return self.codec.encode(table, context)

    def _measure(
        self,
        name: str,
        encoded: list[Encoded],
        shape: tuple[int, int],
        deltas: Sequence[torch.Tensor],
    ) -> None:
        stored = torch.zeros(shape)
        for term, parts in encoded:
            stored += term.decode(parts, shape, Context(name))
        for i, delta in enumerate(deltas):
            own, taken = self.method.weigh(delta, stored[: delta.shape[0]])
            self.own[i] += own
            self.taken[i] += taken


def _names(given: Sequence[str], targets: Sequence[TensorSource]) -> list[str]:
    names = list(given) or [t.reference.name.rpartition("/")[2] for t in targets]
    if len(names) != len(targets):
        raise DeltafoldError(
            "bad-argument",
            f"{len(names)} names were given for {len(targets)} fine-tunes.",
            fix="--names a,b,c",
        )
    odd = [
        name
        for i, name in enumerate(names)
        if not name or name in names[:i] or name != Path(name).name or name.startswith(".")
    ]
    if odd:
        raise DeltafoldError(
            "bad-argument",
            f"{odd[0]!r} cannot be the name of a delta, or is given twice.",
            facts=[("names", ", ".join(names))],
            fix="--names a,b,c",
        )
    return names


def _check(
    source: Checkpoint,
    targets: Sequence[TensorSource],
    names: Sequence[str],
    recipe: Recipe,
    codec: Method | None,
    accept: Collection[str],
) -> None:
    """What can be known before the first tensor is read."""
    if len(targets) < 2:
        raise DeltafoldError(
            "bad-argument",
            "a family has two fine-tunes or more.",
            fix="one alone is packed by: deltafold compress",
        )
    if recipe.edits:
        raise DeltafoldError("bad-argument", "a family's deltas cannot be edited.")
    if codec is not None:
        check_needs(codec.needs, None, spec_of(codec))
    for target in targets:
        compare(source, target, accept)
        folders = (source.folder, target.reference.folder)
        check_tokenizer(*folders, accepted="tokenizer" in accept)
    unused = [p for p in recipe.unused(source.names()) if recipe.unused(targets[0].names())]
    if unused:
        raise DeltafoldError(
            "bad-recipe",
            f"no tensor matches {unused[0]!r}.",
            facts=[("tensors", name_some(source.names(), len(source.names())))],
            fix="a pattern is matched with the whole name: begin or end it with *",
        )


def _move(staged: Path, zoo: Path, family: Family, names: Sequence[str], overwrite: bool) -> None:
    """From the staging folder to the zoo: first what is shared, then who needs it."""
    hexadecimal = family.digest.removeprefix("sha256:")
    place = zoo / FOLDER / hexadecimal
    if (place / NAME).is_file():
        Family(place)  # the same content lies there; raises if that is broken
    else:
        _publish(family.folder, place)
    for name in names:
        _publish(staged / name, zoo / name, overwrite=overwrite)


def _publish(source: Path, out: Path, *, overwrite: bool = False) -> None:
    with Staging(out, overwrite=overwrite) as staging:
        for path in source.iterdir():
            path.rename(staging.folder / path.name)
        staging.publish()
