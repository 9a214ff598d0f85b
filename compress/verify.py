"""Checking a delta: its files, its payload, its base, and that nothing is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import Checkpoint, Spec
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.fingerprint import TensorDigest, digest_source
from deltafold.compress.memory import MemoryBudget
from deltafold.compress.naming import renamed
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.quantized import block_of, fits
from deltafold.compress.rebuild import restored_pieces
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.several import cores, finished
from deltafold.compress.terms import Rows

#: Threads that hash a payload; more wait for the disk.
_MOST_THREADS: Final = 8


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked.

    Attributes:
        delta_id: the delta's content digest.
        tensors: tensors of the fine-tune.
        coded: those with a payload, all of which match their checksums.
        base_checked: whether the base's fingerprint was compared.
        restored: tensors that were rebuilt and have the fine-tune's own sha256.
    """

    delta_id: str
    tensors: int
    coded: int
    base_checked: bool
    restored: int


def verify_delta(
    delta: str | Path,
    *,
    base: str | Path | None = None,
    full: bool = False,
    progress: OnProgress = ignore,
) -> VerifyReport:
    """Check a delta repo; returns only if all is well.

    Args:
        delta: folder or hub id.
        base: also check that this is the delta's base and that every tensor is accounted for.
        full: also rebuild each exactly stored tensor and compare its sha256 (needs `base`).
        progress: called after every tensor.

    Raises:
        DeltafoldError: the first thing that is wrong.
    """
    repo = DeltaRepo.open(delta)
    restored = 0
    if base is None:
        if full:
            raise DeltafoldError("bad-argument", "a full check needs the base.", fix="--base BASE")
        check_payload(repo, progress)
    else:
        source = Checkpoint.open(base)
        digests = digest_source(source)
        repo.check_base(digests, given=source.reference.name)
        check_coverage(repo, digests)
        restored = _check_restored(repo, source, progress) if full else 0
        if not full:
            check_payload(repo, progress)
    return VerifyReport(
        delta_id=repo.digest,
        tensors=len(repo.variant_names()),
        coded=len(repo.manifest.tensors),
        base_checked=base is not None,
        restored=restored,
    )


def check_payload(
    repo: DeltaRepo,
    progress: OnProgress = ignore,
    jobs: int | None = None,
    budget: MemoryBudget | None = None,
) -> None:
    """Read every part and compare checksums.

    Args:
        repo: the delta.
        progress: called after every tensor.
        jobs: tensors at a time, of each of which one part is in memory; one a core if None.
        budget: of memory for those parts; no bound if None.
    """
    names, bounded = sorted(repo.manifest.tensors), budget or MemoryBudget(None)

    def check(name: str) -> None:
        with bounded.hold(_largest_part(repo, name)):
            repo.check_parts(name)

    threads = cores(_MOST_THREADS) if jobs is None else jobs
    for done, name in enumerate(finished(check, names, threads), 1):
        progress(Progress("verify", name, done, len(names), repo.entry(name).bytes))


def _largest_part(repo: DeltaRepo, name: str) -> int:
    shape = tuple(repo.entry(name).shape)
    sizes = [spec.nbytes for term in repo.terms(name) for spec in term.parts(shape).values()]
    return max(sizes, default=0)


def check_coverage(repo: DeltaRepo, base: Mapping[str, TensorDigest]) -> None:
    """Every tensor of the base is coded, unchanged, or known to be absent; or `coverage`.

    Args:
        repo: the delta.
        base: digests by the base's own names.
    """
    manifest = repo.manifest
    own, base = base, {renamed(manifest.base_names, name): d for name, d in base.items()}
    if len(base) < len(own):
        raise DeltafoldError(
            "bad-manifest",
            f"{repo.folder}: its base_names give two tensors of the base one name.",
            fix="pack the fine-tune again",
        )
    untied = manifest.untied or {}
    gone = set(manifest.absent)
    odd = sorted(n for n, tied in untied.items() if n in {*base, *gone} or tied not in base)
    if odd or manifest.untied == {}:
        raise DeltafoldError(
            "bad-manifest",
            f"{repo.folder}: what it says of untied tensors does not fit its base.",
            facts=[("untied", ", ".join(odd) or "nothing")],
            fix="pack the fine-tune again",
        )
    base |= {name: base[tied] for name, tied in untied.items()}
    known = {*manifest.tensors, *manifest.unchanged, *manifest.absent}
    missing = sorted(set(base) - known)
    orphans = sorted({*manifest.unchanged, *manifest.absent} - set(base))
    twice = sorted(set(manifest.tensors) & {*manifest.unchanged, *manifest.absent})
    for what, names in (("missing", missing), ("unknown", orphans), ("listed twice", twice)):
        if names:
            raise DeltafoldError(
                "coverage",
                f"{repo.folder} does not account for every tensor.",
                facts=[(what, name_some(names, len(base)))],
                fix="pack the fine-tune again",
            )
    for name in manifest.tensors:
        _check_shape(repo, name, base.get(name))
    _check_quantised(repo, base)


def _check_shape(repo: DeltaRepo, name: str, base: TensorDigest | None) -> None:
    """Only rows may differ from the base's, and what the base lacks must be stored whole."""
    entry = repo.entry(name)
    shape = None if base is None else base.shape
    sound = entry.base_shape == shape
    if shape is None:
        sound = sound and repo.exact(name)
    elif entry.shape != shape:
        sound = sound and len(shape) == len(entry.shape) >= 1 and entry.shape[1:] == shape[1:]
        sound = sound and _added(repo, name) == max(entry.shape[0] - shape[0], 0)
    if not sound:
        raise DeltafoldError(
            "bad-manifest",
            f"{repo.folder}: {name} does not fit the base's tensor.",
            facts=[("delta", list(entry.shape)), ("base", shape and list(shape))],
            fix="pack the fine-tune again",
        )


def _check_quantised(repo: DeltaRepo, base: Mapping[str, TensorDigest]) -> None:
    """What is quantised is a matrix of the base, and differs from what it was."""
    quantization = repo.manifest.base_quantization
    if quantization is None:
        return
    sound = quantization.block == block_of(quantization.method)
    sound = sound and list(quantization.tensors) == sorted(repo.quantised)
    odd = [
        name
        for name in quantization.tensors
        if name in repo.manifest.unchanged
        or name not in base
        or not fits(Spec(base[name].dtype, base[name].shape))
    ]
    if odd or not sound:
        raise DeltafoldError(
            "bad-manifest",
            f"{repo.folder}: its base_quantization does not fit the base.",
            facts=[("tensors", name_some(odd, len(quantization.tensors)))] if odd else [],
            fix="pack the fine-tune again",
        )


def _added(repo: DeltaRepo, name: str) -> int:
    """Rows that are stored because the base lacks them."""
    return sum(term.added for term in repo.terms(name) if isinstance(term, Rows))


def _check_restored(repo: DeltaRepo, source: Checkpoint, progress: OnProgress) -> int:
    names, restored = sorted(repo.manifest.tensors), 0
    for done, name in enumerate(names, 1):
        entry = repo.entry(name)
        if repo.exact(name):
            for _ in restored_pieces(repo, source, name):
                pass
            restored += 1
        else:
            repo.check_parts(name)
        size = math.prod(entry.shape) * dtypes.TORCH[entry.dtype].itemsize
        progress(Progress("verify", name, done, len(names), size))
    return restored
