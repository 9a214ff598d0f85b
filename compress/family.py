"""What several deltas share: a folder of its own beside them, found by its digest.

A family lies in `.families/<hex of its digest>/`, in the folder that holds the deltas or in a delta
repo itself. It has a small manifest, `family.json`, and a payload of tensors coded by terms.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from deltafold.compress import dtypes
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.manifest import Digest, FileEntry, Sha, Size, check_version
from deltafold.compress.payload import payload_digest, payload_key
from deltafold.compress.safetensors_file import SafetensorsFile
from deltafold.compress.terms import Context, Term, term_from_config

FOLDER = ".families"
NAME = "family.json"
FORMAT = "deltafold-family"
FORMAT_VERSION = "1.0"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SharedEntry(_Strict):
    """One shared tensor, a matrix: the terms whose sum it is, and their bytes."""

    shape: tuple[Size, Size]
    terms: tuple[dict[str, Any], ...]
    payload_sha256: Sha
    bytes: Size


class FamilyManifest(_Strict):
    """The whole of `family.json`."""

    format: Literal["deltafold-family"] = "deltafold-family"
    format_version: str = FORMAT_VERSION
    family_id: Digest
    #: Fingerprint of the base of all its deltas.
    base: Digest
    method: str
    codec: str
    members: tuple[str, ...]
    created_by: str
    tensors: dict[str, SharedEntry]
    files: dict[str, FileEntry]

    def content_digest(self) -> str:
        """`sha256:<hex>` over what decides the shared tensors; the value of `family_id`."""
        content = {
            "format": self.format,
            "major": self.format_version.split(".")[0],
            "base": self.base,
            "tensors": {
                key: [list(t.shape), list(t.terms), t.payload_sha256]
                for key, t in self.tensors.items()
            },
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def bytes(self) -> int:
        """Of all payload files."""
        return sum(entry.bytes for entry in self.files.values())


class Family:
    """A family that was opened; its tensors are read and checked when asked for.

    Raises:
        DeltafoldError: `not-found`, `bad-manifest`, `newer-format`, `unknown-codec`, `truncated`, or
            `checksum` where the manifest was changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read(folder / NAME)
        self._terms = {
            key: tuple(term_from_config(c, where=f"{folder}: {key}") for c in entry.terms)
            for key, entry in self.manifest.tensors.items()
        }
        self._shards = self._open_shards()
        self._checked: set[str] = set()

    @property
    def digest(self) -> str:
        """`sha256:...` of the content."""
        return self.manifest.family_id

    def terms(self, key: str) -> tuple[Term, ...]:
        """The terms whose sum is a shared tensor."""
        return self._terms[key]

    def tensor(self, key: str) -> torch.Tensor:
        """A shared tensor, decoded: float32 `[R, M]`. Raises `checksum` where a bit differs."""
        shape = self.manifest.tensors[key].shape
        total = torch.zeros(shape)
        for term, parts in zip(self._terms[key], self._parts(key), strict=True):
            total += term.decode(parts, shape, Context(key))
        return total

    def check(self, key: str) -> None:
        """Read a shared tensor's bytes once; raises `checksum` where a bit differs."""
        if key not in self._checked:
            self._parts(key)

    def _parts(self, key: str) -> list[dict[str, torch.Tensor]]:
        entry, found = self.manifest.tensors[key], []
        for index, term in enumerate(self._terms[key]):
            names = {part: payload_key(key, index, part) for part in term.parts(entry.shape)}
            found.append({part: self._shards[n].tensor(n) for part, n in names.items()})
        if payload_digest(found) != entry.payload_sha256:
            raise DeltafoldError(
                "checksum",
                f"{self.folder}: the payload of {key} was changed or damaged.",
                facts=[("expected", f"sha256 {entry.payload_sha256[:16]}...")],
                fix="copy the family again, or pack it again: deltafold family",
            )
        self._checked.add(key)
        return found

    def _open_shards(self) -> dict[str, SafetensorsFile]:
        home: dict[str, SafetensorsFile] = {}
        for name, entry in self.manifest.files.items():
            path = self.folder / name
            if Path(name).name != name:
                raise DeltafoldError("bad-manifest", f"{self.folder}: {name} leaves the folder.")
            size = path.stat().st_size if path.is_file() else -1
            if size != entry.bytes:
                raise DeltafoldError(
                    "truncated",
                    f"{path} is {'missing' if size < 0 else 'not as long as it was written'}.",
                    facts=[
                        ("expected", f"{entry.bytes} bytes"),
                        ("found", f"{max(size, 0)} bytes"),
                    ],
                    fix="copy or download the family again",
                )
            if name.endswith(".safetensors"):
                shard = SafetensorsFile(path, code="bad-manifest")
                home |= dict.fromkeys(shard.entries, shard)
        self._check_parts(home)
        return home

    def _check_parts(self, home: dict[str, SafetensorsFile]) -> None:
        promised = {
            payload_key(key, index, part): (dtypes.NAMES[spec.dtype], spec.shape)
            for key, terms in self._terms.items()
            for index, term in enumerate(terms)
            for part, spec in term.parts(self.manifest.tensors[key].shape).items()
        }
        found = {n: (f.entries[n].dtype, f.entries[n].shape) for n, f in home.items()}
        if found != promised:
            odd = sorted(n for n in {*found, *promised} if found.get(n) != promised.get(n))
            raise DeltafoldError(
                "coverage",
                f"{self.folder}: payload and manifest do not hold the same parts.",
                facts=[("first differences", name_some(odd, len(promised)))],
                fix="copy or download the family again",
            )


def find_family(delta: Path, digest: str) -> Family:
    """The family of a delta repo: in the repo itself, or in the folder that holds the repo.

    Raises:
        DeltafoldError: `not-found`, naming the family; what is wrong with it.
    """
    hexadecimal = digest.removeprefix("sha256:")
    places = [folder / FOLDER / hexadecimal for folder in (delta, delta.resolve().parent)]
    place = next((p for p in places if (p / NAME).is_file()), None)
    if place is None:
        raise DeltafoldError(
            "not-found",
            f"{delta} shares tensors with others, and their family is not there.",
            facts=[("family", digest), ("looked in", ", ".join(map(str, places)))],
            fix=f"copy {FOLDER}/{hexadecimal} from where the delta was made to {places[1]}",
        )
    family = Family(place)
    if family.digest != digest:
        raise DeltafoldError(
            "checksum",
            f"{place} is not the family that its name says.",
            facts=[("expected", digest), ("found", family.digest)],
            fix="copy the family again, or pack it again: deltafold family",
        )
    return family


def families_in(folder: Path) -> list[Path]:
    """Folders of all families of a zoo, sorted."""
    return sorted(path.parent for path in (folder / FOLDER).glob(f"*/{NAME}"))


def _read(path: Path) -> FamilyManifest:
    try:
        data = json.loads(path.read_text("utf-8", errors="replace"))
    except OSError as error:
        raise DeltafoldError("not-found", f"{path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DeltafoldError("bad-manifest", f"{path} is not JSON: {error}.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DeltafoldError("bad-manifest", f'{path} does not say "format": "{FORMAT}".')
    check_version(str(data.get("format_version", "")), str(path))
    try:
        manifest = FamilyManifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise DeltafoldError(
            "bad-manifest",
            f"{path} breaks the schema in {error.error_count()} places.",
            facts=[("first", f"{'.'.join(map(str, first['loc']))}: {first['msg']}")],
            fix="copy the family again, or pack it again: deltafold family",
        ) from error
    if manifest.content_digest() != manifest.family_id:
        raise DeltafoldError(
            "checksum",
            f"{path} was changed after it was written.",
            facts=[("family_id", manifest.family_id), ("content", manifest.content_digest())],
            fix="copy the family again, or pack it again: deltafold family",
        )
    return manifest
