"""Several deltas of one base as the fine-tune that their merge makes, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import Checkpoint, Spec
from deltafold.compress.companions import check_tokenizer
from deltafold.compress.differences import difference
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.fingerprint import Digests, digest_source
from deltafold.compress.hub import Reference
from deltafold.compress.merges import Merge, Merging, SurveyedMerge
from deltafold.compress.naming import NamedBase
from deltafold.compress.repo import DeltaRepo, pad_rows
from deltafold.compress.terms import Context


@dataclass(frozen=True)
class Parents:
    """Deltas of one base whose structure is the same, with their weights.

    What the base has not (new tensors, added rows) has no difference to merge: there the weighted mean
    of the values stands. Only floating-point tensors are merged; others must be equal.

    Raises:
        DeltafoldError: `base-mismatch`; `shape-mismatch`, `unexpected-tensor`, `missing-tensor` or
            `tokenizer-changed` where the deltas differ in structure; `bad-argument`.

    Attributes:
        base: under the names of all deltas.
        repos: the deltas.
        weights: of each.
        digests: of the base's tensors, by the deltas' names.
    """

    base: NamedBase
    repos: tuple[DeltaRepo, ...]
    weights: tuple[float, ...]
    digests: Digests

    @classmethod
    def open(
        cls, base: Checkpoint, deltas: Sequence[str | Path], weights: Sequence[float] | None
    ) -> Parents:
        """Open the deltas and check that they can be merged."""
        weights = tuple(weights) if weights is not None else (1.0,) * len(deltas)
        if not deltas or len(weights) != len(deltas):
            raise DeltafoldError(
                "bad-argument",
                f"{len(deltas)} deltas and {len(weights)} weights do not go together.",
                fix="give as many weights as deltas, or none",
            )
        if not all(float("-inf") < w < float("inf") for w in weights):
            raise DeltafoldError("bad-argument", "weights must be numbers.")
        digests = digest_source(base)
        repos = tuple(DeltaRepo.open(d) for d in deltas)
        for repo in repos:
            repo.check_base(digests, given=base.reference.name)
        for repo in repos[1:]:
            _same_names(repos[0], repo)
        named = repos[0].named(base)
        parents = cls(named, repos, weights, named.named(digests))
        parents._check_structure()
        return parents

    @property
    def names(self) -> list[str]:
        """Sorted names of the tensors of the merged model."""
        return self.repos[0].variant_names()

    @property
    def accepted(self) -> frozenset[str]:
        """The differences in structure that were accepted when the deltas were packed."""
        return frozenset(word for repo in self.repos for word in repo.manifest.accepted)

    def spec(self, name: str) -> Spec:
        """Dtype (the base's, where it has the tensor) and shape of a merged tensor."""
        entry = next((e for r in self.repos if (e := r.manifest.tensors.get(name))), None)
        if entry is None:
            return self.base.spec(name)
        dtype = self.base.spec(name).dtype if name in self.base else entry.dtype
        return Spec(dtype, tuple(entry.shape))

    def coded(self, name: str) -> bool:
        """Whether a delta changes a tensor."""
        return any(name in repo.manifest.tensors for repo in self.repos)

    def deltas(self, name: str) -> list[torch.Tensor]:
        """Every model's float32 difference to the base, rows beyond the base's included.

        Raises:
            DeltafoldError: `not-finite` for NaN or infinity, which a lossless delta may hold: an
                election would lose it without a word, and a sum would spread it.
        """
        shape = self.spec(name).shape
        found = []
        for repo in self.repos:
            coded = name in repo.manifest.tensors
            # One may have been taken against the dequantised base, another against the original.
            found.append(
                difference(repo, self.base.checkpoint, name) if coded else torch.zeros(shape)
            )
            if coded and not bool(torch.isfinite(found[-1]).all()):
                raise DeltafoldError(
                    "not-finite",
                    f"{name} of {repo.folder.name} has NaN or infinite entries, which cannot be "
                    "merged.",
                    fix="check the fine-tune that it was packed from",
                )
        return found

    def read(self) -> Deltas:
        """All differences that are merged, for a survey."""
        return Deltas(self)

    def mergeable(self, name: str) -> bool:
        """Whether a tensor's differences are merged, and not its values averaged."""
        spec = self.spec(name)
        return name in self.base and spec.dtype in dtypes.FLOATS and self.coded(name)

    def shared_rows(self, name: str) -> int | None:
        """Rows of a tensor that the base has too; None for scalars."""
        shape = self.spec(name).shape
        return min(shape[0], self.base.spec(name).shape[0]) if shape else None

    def mean(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weighted mean, float32."""
        total = sum(self.weights)
        if total == 0:
            raise DeltafoldError(
                "bad-argument",
                "the weights add up to zero, and values that the base lacks have no such mean.",
                fix="choose other weights",
            )
        return torch.stack(
            [v * (w / total) for v, w in zip(values, self.weights, strict=True)]
        ).sum(0)

    def _check_structure(self) -> None:
        first, *others = self.repos
        for other in others:
            self._same_shapes(first, other)
            if check_tokenizer(first.folder, other.folder, accepted=True):
                raise DeltafoldError(
                    "tokenizer-changed",
                    f"{other.folder} has another tokenizer than {first.folder}.",
                    fix="merge deltas whose tokens mean the same",
                )
        for name in self.names:
            if self.coded(name) and self.spec(name).dtype not in dtypes.FLOATS:
                self._same_values(name)

    def _same_shapes(self, first: DeltaRepo, other: DeltaRepo) -> None:
        ours, theirs = set(first.variant_names()), set(other.variant_names())
        only = sorted(ours ^ theirs)
        if only:
            code = "missing-tensor" if only[0] in self.base else "unexpected-tensor"
            raise DeltafoldError(
                code,
                f"{first.folder} and {other.folder} have different tensors.",
                facts=[("only in one of them", name_some(only, len(ours | theirs)))],
                fix="merge deltas of one structure",
            )
        for name in sorted(ours):
            shapes = [self._shape(repo, name) for repo in (first, other)]
            if shapes[0] != shapes[1]:
                raise DeltafoldError(
                    "shape-mismatch",
                    f"{name} has another shape in {other.folder} than in {first.folder}.",
                    facts=[
                        (r.folder.name, list(s))
                        for r, s in zip((first, other), shapes, strict=True)
                    ],
                    fix="merge deltas that added the same tokens, or none",
                )

    def _shape(self, repo: DeltaRepo, name: str) -> tuple[int, ...]:
        entry = repo.manifest.tensors.get(name)
        return tuple(entry.shape) if entry else self.base.spec(name).shape

    def _same_values(self, name: str) -> None:
        found = {
            e.sha256 if (e := repo.manifest.tensors.get(name)) else self.digests[name].sha256
            for repo in self.repos
        }
        if len(found) > 1:
            raise DeltafoldError(
                "bad-argument",
                f"{name} is {self.spec(name).dtype} and differs between the deltas; only "
                "floating-point tensors can be merged.",
                fix="merge deltas in which it is the same",
            )


def _same_names(first: DeltaRepo, other: DeltaRepo) -> None:
    """Refuse deltas of fine-tunes that call the base's tensors differently."""
    schemes = [repo.manifest.base_names for repo in (first, other)]
    untied = [repo.manifest.untied or {} for repo in (first, other)]
    if untied[0] != untied[1]:
        raise DeltafoldError(
            "unexpected-tensor",
            f"{first.folder} and {other.folder} do not untie the same tensors of their base.",
            facts=[
                (repo.folder.name, ", ".join(names) or "none")
                for repo, names in zip((first, other), untied, strict=True)
            ],
            fix="merge fine-tunes that all untied their head, or none of which did",
        )
    if schemes[0] == schemes[1]:
        return
    raise DeltafoldError(
        "unexpected-tensor",
        f"{first.folder} and {other.folder} give the base's tensors different names.",
        facts=[
            (repo.folder.name, "the base's own" if scheme is None else scheme.text())
            for repo, scheme in zip((first, other), schemes, strict=True)
        ],
        fix="save both fine-tunes as models of one class, and pack them again",
    )


@dataclass(frozen=True)
class Deltas:
    """All differences that are merged, tensor by tensor, anew each time it is iterated."""

    parents: Parents

    def __iter__(self) -> Iterator[tuple[str, list[torch.Tensor]]]:
        for name in self.parents.names:
            if self.parents.mergeable(name):
                rows = self.parents.shared_rows(name)
                found = self.parents.deltas(name)
                yield name, found if rows is None else [delta[:rows] for delta in found]


#: What becomes of the differences of one tensor.
Combine = Callable[[str, list[torch.Tensor]], torch.Tensor]


class MergedSource:
    """The fine-tune that a merge makes; merged tensors have the base's dtype.

    Args:
        parents: what is merged.
        combine: merges the differences of one tensor.
        reference: whose folder has the companions.
    """

    def __init__(self, parents: Parents, combine: Combine, reference: Reference) -> None:
        self.reference = reference
        self._parents, self._combine = parents, combine
        # Packing asks for a tensor's difference and then for its value.
        self._last: tuple[str, torch.Tensor] | None = None

    def names(self) -> list[str]:
        """Sorted tensor names."""
        return self._parents.names

    def spec(self, name: str) -> Spec:
        """Dtype and shape."""
        return self._parents.spec(name)

    def delta(self, name: str) -> torch.Tensor | None:
        """The merged float32 difference; None where nothing is merged or all of it is zero."""
        parents = self._parents
        if not parents.mergeable(name):
            return None
        if self._last is None or self._last[0] != name:
            found, rows = parents.deltas(name), parents.shared_rows(name)
            if rows is None:
                merged = self._combine(name, found)
            else:
                merged = self._combine(name, [delta[:rows] for delta in found])
                if rows < found[0].shape[0]:
                    merged = torch.cat([merged, parents.mean([delta[rows:] for delta in found])])
            self._last = (name, merged)
        merged = self._last[1]
        return merged if bool(merged.any()) else None

    def tensor(self, name: str) -> torch.Tensor:
        """The merged tensor."""
        parents = self._parents
        spec = parents.spec(name)
        dtype = dtypes.TORCH[spec.dtype]
        delta = self.delta(name)
        base = parents.base.tensor(name) if name in parents.base else None
        if spec.dtype in dtypes.FLOATS:
            if base is None:
                return parents.mean(parents.deltas(name)).to(dtype)
            padded = pad_rows(base, spec.shape)
            assert padded is not None
            return padded if delta is None else (padded.to(torch.float32) + delta).to(dtype)
        repo = next((r for r in parents.repos if name in r.manifest.tensors), None)
        if repo is None:
            assert base is not None
            return base
        return repo.restored(name, base)

    def sha256(self, name: str) -> str:
        """Hex digest of the merged tensor's bytes."""
        return dtypes.sha256(self.tensor(name))


def combining(method: Merge | SurveyedMerge, parents: Parents) -> Combine:
    """A merge, told of the whole models where it asks for that, as a function of one tensor."""
    merging: Merging = (
        method.survey(parents.read(), parents.weights)
        if isinstance(method, SurveyedMerge)
        else method
    )

    def combine(name: str, deltas: list[torch.Tensor]) -> torch.Tensor:
        return merging.merge(deltas, parents.weights, Context(name))

    return combine
