"""Merging deltas: several delta repos of one base in, one or more delta repos out.

No dense checkpoint is made: tensors are decoded, merged and coded one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.companions import named
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import EvidenceSource, check_needs
from deltafold.compress.hub import Reference
from deltafold.compress.merged import MergedSource, Parents, combining
from deltafold.compress.merges import Merge, SurveyedMerge, Twin
from deltafold.compress.naming import NamedBase
from deltafold.compress.pipeline import Job, PackReport, pack
from deltafold.compress.progress import OnProgress, ignore
from deltafold.compress.recipe import Recipe
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.spec import spec_of
from deltafold.compress.staging import Staging
from deltafold.compress.terms import Context, Encoded

#: The name of the delta that all tasks of `twin_deltas` share.
SHARED = "shared"


def merge_deltas(
    base: str | Path,
    deltas: Sequence[str | Path],
    out: str | Path,
    *,
    method: Merge | SurveyedMerge,
    weights: Sequence[float] | None = None,
    recipe: Recipe | None = None,
    companions: int = 0,
    accept: Collection[str] = (),
    overwrite: bool = False,
    command: str = "",
    evidence: EvidenceSource | None = None,
    progress: OnProgress = ignore,
) -> PackReport:
    """Merge deltas of one base into one delta.

    Args:
        base: folder or hub id of the base checkpoint.
        deltas: folders or hub ids of delta repos, of any codecs.
        out: the delta repo to write; nothing stands there until it is whole and verified.
        method: how tensors are merged, see `merges`.
        weights: of the deltas, all 1 if None.
        recipe: which codec for which tensor, and edits after the merge; as in `compress_checkpoint`.
        companions: number of the delta whose configuration, tokenizer and so on are taken, from 0.
        accept: differences in structure to the base, besides those that the deltas' makers accepted.
        overwrite: replace an existing `out`.
        command: recorded in the manifest and card.
        evidence: of a calibration run, for methods that need one.
        progress: called after every tensor.

    Raises:
        DeltafoldError: what `Parents` and `compress_checkpoint` raise; `bad-argument` for `twin`,
            which makes several deltas (`twin_deltas`).
    """
    if isinstance(method, Twin):
        raise DeltafoldError(
            "bad-argument",
            "twin makes several deltas, not one.",
            fix="call twin_deltas, which writes a zoo folder",
        )
    check_needs(method.needs, evidence, spec_of(method))
    merge = _Merge.open(base, deltas, method, weights, companions)
    job = merge.job(recipe or Recipe(), accept, command, progress)
    return pack(replace(job, evidence=evidence), out, overwrite=overwrite)


def twin_deltas(
    base: str | Path,
    deltas: Sequence[str | Path],
    out: str | Path,
    *,
    method: Twin | None = None,
    weights: Sequence[float] | None = None,
    recipe: Recipe | None = None,
    companions: int = 0,
    accept: Collection[str] = (),
    overwrite: bool = False,
    command: str = "",
    progress: OnProgress = ignore,
) -> dict[str, PackReport]:
    """Write a zoo folder: one delta that all share, and beside it what each has of its own.

    `shared` is coded by the recipe. Each task's own delta has its delta's name; its matrices are
    `lowrank` terms against what `shared` decodes to, so that `shared + own` comes as near to the task's
    fine-tune as the rank allows. By itself an own delta is no model: requests mix it, `shared+sql*0.7`.

    Args:
        base: as in `merge_deltas`, as for the others.
        deltas: see `merge_deltas`; their names must differ.
        out: the zoo folder; nothing stands there until all of it is whole and verified.
        method: coefficient and share of ranks.
        weights: see `merge_deltas`; of the shared delta.
        recipe: of the shared delta, and of the vectors of all.
        companions: see `merge_deltas`; of the shared delta. The others have their own.
        accept: see `merge_deltas`.
        overwrite: see `merge_deltas`; an existing zoo is never replaced.
        command: see `merge_deltas`.
        progress: see `merge_deltas`.

    Raises:
        DeltafoldError: as `merge_deltas`; `bad-argument` where two deltas have one name, or one is
            called `shared`; `shape-mismatch` where tokens or tensors were added.
    """
    method, recipe = method or Twin(), recipe or Recipe()
    merge = _Merge.open(base, deltas, method, weights, companions)
    merge.check_twin()
    folders = [repo.folder for repo in merge.parents.repos]
    reports = {}
    with Staging(Path(out), overwrite=overwrite, inputs=[merge.base.folder, *folders]) as staging:
        shared = staging.folder / SHARED
        reports[SHARED] = pack(merge.job(recipe, accept, command, progress), shared)
        for number, name in enumerate(merge.names):
            job = merge.own_job(number, DeltaRepo.open(shared), recipe, accept, command, progress)
            reports[name] = pack(job, staging.folder / name)
        staging.publish()
    return {name: replace(r, out=Path(out) / name) for name, r in reports.items()}


@dataclass(frozen=True)
class _Merge:
    """Parents and the method that merges them."""

    parents: Parents
    method: Any
    companions: int

    @classmethod
    def open(
        cls,
        base: str | Path,
        deltas: Sequence[str | Path],
        method: Merge | SurveyedMerge,
        weights: Sequence[float] | None,
        companions: int,
    ) -> _Merge:
        if not 0 <= companions < len(deltas):
            raise DeltafoldError(
                "bad-argument",
                f"companions cannot be taken from delta {companions + 1} of {len(deltas)}.",
            )
        return cls(Parents.open(Checkpoint.open(base), deltas, weights), method, companions)

    @property
    def base(self) -> NamedBase:
        return self.parents.base

    @property
    def names(self) -> list[str]:
        return [repo.reference.name.rpartition("/")[2] for repo in self.parents.repos]

    def check_twin(self) -> None:
        names = [SHARED, *self.names]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise DeltafoldError(
                "bad-argument",
                f"two deltas of the zoo would be called {twice[0]!r}.",
                fix="give the deltas' folders different names",
            )
        changed = {"resized", "new-tensors", "missing-tensors"} & self.parents.accepted
        if changed:
            raise DeltafoldError(
                "shape-mismatch",
                "twin needs deltas with the base's own tensors and shapes.",
                facts=[("these have", ", ".join(sorted(changed)))],
                fix="merge them into one delta: --method task or ties",
            )

    def job(
        self, recipe: Recipe, accept: Collection[str], command: str, progress: OnProgress
    ) -> Job:
        repo = self.parents.repos[self.companions]
        reference = Reference(repo.folder, "+".join(self.names))
        target = MergedSource(self.parents, combining(self.method, self.parents), reference)
        return self._job(target, repo, recipe, accept, command, progress, {})

    def own_job(
        self,
        number: int,
        shared: DeltaRepo,
        recipe: Recipe,
        accept: Collection[str],
        command: str,
        progress: OnProgress,
    ) -> Job:
        """What one task has beyond the shared delta."""
        repo, base = self.parents.repos[number], self.base

        def combine(name: str, deltas: list[torch.Tensor]) -> torch.Tensor:
            if name not in shared.manifest.tensors:
                return deltas[number]
            return deltas[number] - shared.delta(name, base.tensor(name))

        target = MergedSource(self.parents, combine, repo.reference)

        def given(name: str) -> tuple[list[Encoded], torch.Tensor] | None:
            delta = target.delta(name)
            if delta is None or delta.dim() < 2:
                return None
            term = self.method.exclusive(tuple(delta.shape))
            return [term.encode(delta, Context(name))], delta

        record = {"own": self.names[number], "shared": shared.digest, "default": "lowrank"}
        # Edits and codecs of matrices are the shared delta's.
        vectors = Recipe(vectors=recipe.vectors)
        job = self._job(target, repo, vectors, accept, command, progress, record)
        return replace(job, given=given)

    def _job(
        self,
        target: MergedSource,
        companions: DeltaRepo,
        recipe: Recipe,
        accept: Collection[str],
        command: str,
        progress: OnProgress,
        more: dict[str, Any],
    ) -> Job:
        merged = {
            "method": spec_of(self.method),
            "weights": list(self.parents.weights),
            "deltas": [
                {"name": name, "delta_id": repo.digest}
                for name, repo in zip(self.names, self.parents.repos, strict=True)
            ],
        }
        record = recipe.to_json() | {"merge": merged}
        if more:
            record |= {"default": more.pop("default")}
            record["merge"] = merged | more
        return Job(
            self.base,
            target,
            named(companions.folder),
            recipe,
            frozenset(accept) | self.parents.accepted,
            command,
            progress,
            record=record,
            delta=target.delta,
        )
