"""Reading a delta repo: the manifest, the payload, and the fine-tune's tensors made of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.family import Family, find_family
from deltafold.compress.fingerprint import Digests, TensorDigest, fingerprint, first_differences
from deltafold.compress.hub import Reference, resolve
from deltafold.compress.manifest import (
    BASE_TENSORS_NAME,
    MANIFEST_NAME,
    Manifest,
    Quantization,
    TensorEntry,
    is_evidence,
    parse_manifest,
)
from deltafold.compress.naming import NamedBase, renamed
from deltafold.compress.payload import payload_digest, payload_key
from deltafold.compress.quantized import dequantized
from deltafold.compress.safetensors_file import SafetensorsFile
from deltafold.compress.terms import (
    Context,
    Encoded,
    ExactTerm,
    Shared,
    Term,
    is_exact,
    term_from_config,
)


class DeltaRepo:
    """A delta repo that was opened and whose files are all there with the right sizes.

    Raises:
        DeltafoldError: `not-a-delta`, `newer-format`, `bad-manifest`, `unknown-codec`, `truncated`,
            `checksum` (of small files; the payload is checked as it is read, see `parts`); for a
            delta that shares tensors with others `not-found`, naming the family that is missing.

    Attributes:
        families: what the delta shares with others, by digest; empty for most.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.folder = reference.folder
        self.manifest = self._read_manifest()
        self._check_files()
        self._check_dtypes()
        self._terms = {
            name: tuple(term_from_config(c, where=f"{self.folder}: {name}") for c in entry.terms)
            for name, entry in self.manifest.tensors.items()
        }
        self._shards = self._open_shards()
        self.families = {digest: self._open_family(digest) for digest in self._family_digests()}

    @classmethod
    def open(cls, reference: str | Path | Reference) -> DeltaRepo:
        """Open a folder or hub id."""
        return cls(reference if isinstance(reference, Reference) else resolve(reference))

    @property
    def digest(self) -> str:
        """`sha256:...` of the content."""
        return self.manifest.delta_id

    def entry(self, name: str) -> TensorEntry:
        """The manifest's entry of a coded tensor."""
        return self.manifest.tensors[name]

    def terms(self, name: str) -> tuple[Term, ...]:
        """The terms whose sum is a tensor's delta."""
        return self._terms[name]

    def exact(self, name: str) -> bool:
        """Whether the tensor comes back bit for bit."""
        terms = self._terms[name]
        return len(terms) == 1 and is_exact(terms[0])

    @property
    def lossless(self) -> bool:
        """Whether every tensor comes back bit for bit."""
        return all(self.exact(name) for name in self._terms)

    def parts(self, name: str, *, check: bool = True) -> list[Encoded]:
        """The terms of a tensor with their parts.

        Raises:
            DeltafoldError: `checksum` where a bit differs, here or in what is shared with others.
        """
        stored = self.stored(name)
        encoded = [Encoded(t, dict(p)) for t, p in zip(self.terms(name), stored, strict=True)]
        if check:
            self._check(name, (e.parts for e in encoded))
        return encoded

    def stored(self, name: str) -> list[Mapping[str, torch.Tensor]]:
        """By term the parts of a tensor, each read whenever it is asked for, and not checked."""
        shape = tuple(self.entry(name).shape)
        return [
            _Stored(self._shards, {key: payload_key(name, index, key) for key in term.parts(shape)})
            for index, term in enumerate(self.terms(name))
        ]

    def check_parts(self, name: str) -> None:
        """Compare a tensor's checksum, one part in memory at a time; raises as `parts` does."""
        self._check(name, self.stored(name))

    def _check(self, name: str, parts: Iterable[Mapping[str, torch.Tensor]]) -> None:
        expected = self.entry(name).payload_sha256
        if payload_digest(parts) != expected:
            raise DeltafoldError(
                "checksum",
                f"{self.folder}: the payload of {name} was changed or damaged.",
                facts=[("expected", f"sha256 {expected[:16]}...")],
                fix="download or pack the delta again",
            )
        for term in self.terms(name):
            if isinstance(term, Shared):
                self.families[term.family].check(term.key)

    @cached_property
    def quantised(self) -> frozenset[str]:
        """Names of the base's tensors whose dequantised values the delta was taken against."""
        quantization = self.manifest.base_quantization
        return frozenset(quantization.tensors if quantization else ())

    def named(self, base: Checkpoint) -> NamedBase:
        """The base under the fine-tune's names."""
        return NamedBase(base, self.manifest.base_names, self.manifest.untied)

    def base_tensor(self, base: Checkpoint, name: str) -> torch.Tensor | None:
        """What a tensor's delta is added to: the base's tensor, or its dequantised values (float32).

        None where the base has no such tensor. The name is the fine-tune's.
        """
        own = self.named(base).own(name)
        if own is None:
            return None
        value, quantization = base.tensor(own), self.manifest.base_quantization
        if quantization is None or name not in self.quantised:
            return value
        return dequantized(name, value, quantization.method)

    def shared(self, family: str, key: str) -> torch.Tensor:
        """A tensor that the delta shares with others, decoded: float32 `[R, M]`."""
        return self.families[family].tensor(key)

    def context(self, name: str, base: torch.Tensor | None) -> Context:
        """What a coded tensor's terms are decoded with.

        Args:
            name: a coded tensor.
            base: the base's tensor; None where the base has none. Missing rows count as zero.
        """
        padded = pad_rows(base, tuple(self.entry(name).shape))
        return Context(name, padded, shared=self.shared)

    def delta(self, name: str, base: torch.Tensor | None) -> torch.Tensor:
        """The decoded delta of a tensor: float32 of the fine-tune's shape.

        Args:
            name: a coded tensor.
            base: as `base_tensor` gives it; None where there is none. Missing rows count as zero.
        """
        shape = tuple(self.entry(name).shape)
        context = self.context(name, base)
        total = torch.zeros(shape)
        for term, parts in self.parts(name):
            total += term.decode(parts, shape, context)
        return total

    def restored(self, name: str, base: torch.Tensor | None) -> torch.Tensor:
        """The fine-tune's tensor in its own dtype; bit for bit where `exact(name)`."""
        entry = self.entry(name)
        shape, dtype = tuple(entry.shape), dtypes.TORCH[entry.dtype]
        if self.exact(name):
            ((term, parts),) = self.parts(name)
            assert isinstance(term, ExactTerm)
            return term.restore(parts, shape, dtype, self.context(name, base))
        delta, padded = self.delta(name, base), pad_rows(base, shape)
        return (delta if padded is None else padded.to(torch.float32) + delta).to(dtype)

    @cached_property
    def base_tensors(self) -> dict[str, TensorDigest]:
        """The base's tensors as they were when the delta was made."""
        path = self.folder / BASE_TENSORS_NAME
        try:
            data = json.loads(path.read_text("utf-8"))
            found = {n: TensorDigest(d, tuple(s), h) for n, (d, s, h) in data.items()}
            sound = fingerprint(found) == self.manifest.base.fingerprint
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise DeltafoldError(
                "bad-manifest",
                f"{path} does not list the tensors of the base.",
                fix="download or pack the delta again",
            )
        return found

    def check_base(self, digests: Digests, *, given: str) -> None:
        """Raises `base-mismatch` unless `digests` are those of the delta's own base."""
        found = fingerprint(digests)
        expected = self.manifest.base
        if found == expected.fingerprint:
            return
        different = first_differences(self.base_tensors, digests)
        hint = expected.name + (f"@{expected.revision}" if expected.revision else "")
        raise DeltafoldError(
            "base-mismatch",
            f"{self.folder} was packed against another base.",
            facts=[
                ("delta expects", f"{hint}  ({expected.fingerprint[:23]}...)"),
                ("you gave", f"{given}  ({found[:23]}...)"),
                ("first differences", name_some(different, len(self.base_tensors))),
            ],
            fix=f"give the base that it was packed against: {hint}",
        )

    def check_quantization(self, served: Quantization | None) -> None:
        """Raises `base-mismatch` where the base does not run with the values that the delta needs.

        A delta that was taken against the base as it is fits any: there it is added to whatever the
        quantised base holds.
        """
        needed = self.manifest.base_quantization
        if served is not None:
            own = (renamed(self.manifest.base_names, name) for name in served.tensors)
            served = served.model_copy(update={"tensors": tuple(sorted(own))})
        if needed is None or needed == served:
            return
        option = f"--base-quantization {needed.method}"
        facts: list[tuple[str, object]] = [("delta expects", needed.method)]
        if served is None or (served.method, served.block) != (needed.method, needed.block):
            facts.append(("the base runs", served.method if served else "unquantised"))
            fix = f"serve it with {option}, or pack against the original base"
        else:
            odd = sorted(set(needed.tensors) ^ set(served.tensors))
            facts.append(("quantised on one side only", name_some(odd, len(needed.tensors))))
            fix = "pack against the original base: leave --against out"
        raise DeltafoldError(
            "base-mismatch",
            f"{self.folder} was packed against the dequantised base, and this is not it.",
            facts=facts,
            fix=fix,
        )

    def variant_names(self) -> list[str]:
        """Names of all tensors of the fine-tune, sorted."""
        return sorted([*self.manifest.tensors, *self.manifest.unchanged])

    def _read_manifest(self) -> Manifest:
        path = self.folder / MANIFEST_NAME
        if not path.is_file():
            raise DeltafoldError(
                "not-a-delta",
                f"{self.folder} is not a delta repo: it has no {MANIFEST_NAME}.",
                fix=self._what_else(),
            )
        return parse_manifest(path.read_text("utf-8", errors="replace"), str(path))

    def _what_else(self) -> str:
        inside = sorted(p.parent.name for p in self.folder.glob(f"*/{MANIFEST_NAME}"))
        if inside:
            return f"it holds deltas: give one of them, {self.folder / inside[0]} say"
        return "make one with: deltafold compress BASE VARIANT -o DELTA"

    def _check_files(self) -> None:
        for name, entry in self.manifest.files.items():
            path = self.folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise DeltafoldError("bad-manifest", f"{self.folder}: {name} leaves the folder.")
            size = path.stat().st_size if path.is_file() else -1
            if is_evidence(name):
                continue
            if size != entry.bytes:
                raise DeltafoldError(
                    "truncated",
                    f"{path} is {'missing' if size < 0 else 'not as long as it was written'}.",
                    facts=[
                        ("expected", f"{entry.bytes} bytes"),
                        ("found", f"{max(size, 0)} bytes"),
                    ],
                    fix="copy or download the delta again",
                )
            if entry.sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
                raise DeltafoldError(
                    "checksum",
                    f"{path} was changed after the delta was written.",
                    fix="download or pack the delta again; its tokenizer and configuration are "
                    "part of its identity",
                )

    def _family_digests(self) -> list[str]:
        terms = [term for of_one in self._terms.values() for term in of_one]
        return sorted({term.family for term in terms if isinstance(term, Shared)})

    def _open_family(self, digest: str) -> Family:
        family = find_family(self.folder, digest)
        if family.manifest.base != self.manifest.base.fingerprint:
            raise DeltafoldError(
                "bad-manifest", f"{self.folder}: {family.folder} is of another base."
            )
        keys = {
            term.key
            for of_one in self._terms.values()
            for term in of_one
            if isinstance(term, Shared) and term.family == digest
        }
        missing = sorted(keys - set(family.manifest.tensors))
        if missing:
            raise DeltafoldError(
                "coverage",
                f"{self.folder}: {family.folder} lacks tensors that the delta shares.",
                facts=[("missing", name_some(missing, len(keys)))],
                fix="download or pack the delta again",
            )
        return family

    def _check_dtypes(self) -> None:
        for name, entry in self.manifest.tensors.items():
            if entry.dtype not in dtypes.TORCH:
                raise DeltafoldError(
                    "bad-manifest", f"{self.folder}: {name} has the dtype {entry.dtype!r}."
                )

    def _open_shards(self) -> dict[str, SafetensorsFile]:
        home: dict[str, SafetensorsFile] = {}
        for name in self.manifest.files:
            if name.endswith(".safetensors"):
                shard = SafetensorsFile(self.folder / name, code="bad-manifest")
                shard.hold()
                for key in sorted(set(home) & set(shard.entries)):
                    raise DeltafoldError(
                        "bad-manifest", f"{self.folder}: {key} is in two files of the payload."
                    )
                home |= dict.fromkeys(shard.entries, shard)
        promised = self._promised()
        if set(home) != set(promised):
            odd = sorted(set(home) ^ set(promised))
            raise DeltafoldError(
                "coverage",
                f"{self.folder}: payload and manifest do not hold the same parts.",
                facts=[("only in one of them", name_some(odd, len(promised)))],
                fix="download or pack the delta again",
            )
        for key, (dtype, shape) in promised.items():
            entry = home[key].entries[key]
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise DeltafoldError(
                    "bad-manifest",
                    f"{self.folder}: {key} is not what the manifest describes.",
                    facts=[
                        ("expected", f"{dtype} {list(shape)}"),
                        ("found", f"{entry.dtype} {list(entry.shape)}"),
                    ],
                )
        return home

    def _promised(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            payload_key(name, index, key): (dtypes.NAMES[spec.dtype], spec.shape)
            for name, terms in self._terms.items()
            for index, term in enumerate(terms)
            for key, spec in term.parts(tuple(self.entry(name).shape)).items()
        }


class _Stored(Mapping[str, torch.Tensor]):
    """Parts of one term in the payload.

    Args:
        shards: by key of the payload.
        keys: of each part.
    """

    def __init__(self, shards: Mapping[str, SafetensorsFile], keys: Mapping[str, str]) -> None:
        self._shards, self._keys = shards, keys

    def __getitem__(self, key: str) -> torch.Tensor:
        full = self._keys[key]
        return self._shards[full].tensor(full)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def pad_rows(base: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The base's tensor with zero rows up to the fine-tune's first dimension, or cut to it."""
    if base is None or tuple(base.shape) == shape:
        return base
    assert base.dim() == len(shape)
    assert tuple(base.shape[1:]) == shape[1:]
    out = torch.zeros(shape, dtype=base.dtype)
    rows = min(base.shape[0], shape[0])
    out[:rows] = base[:rows]
    return out
