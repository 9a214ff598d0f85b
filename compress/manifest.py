"""`delta_config.json`: what a delta repo says about itself. Described in `docs/format.md`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltafold.compress.errors import DeltafoldError

FORMAT = "deltafold"
#: Readers accept any minor version of their own major version.
FORMAT_VERSION = "1.3"
#: The first minor versions that know these fields; what uses none is still written as 1.0.
_QUANTIZED_VERSION, _NAMES_VERSION, _UNTIED_VERSION = "1.1", "1.2", "1.3"
MANIFEST_NAME = "delta_config.json"
BASE_TENSORS_NAME = "base_tensors.json"
#: Fields that are left out where they are not used, and are part of the identity where they are.
_OPTIONAL = ("base_quantization", "base_names", "untied")

Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(_Strict):
    """A model that took part. `name` and `revision` are hints; `fingerprint` is the identity."""

    name: str
    revision: str | None = None
    fingerprint: Digest


QuantizationMethod: TypeAlias = Literal["nf4", "int8"]


class Quantization(_Strict):
    """How a base is quantised, see `quantized`.

    Attributes:
        method: `nf4` or `int8`.
        block: weights that share a scale, in memory order; 0 is one scale a row.
        tensors: names of the quantised tensors, sorted.
    """

    method: QuantizationMethod
    block: Size
    tensors: tuple[str, ...]


class BaseNames(_Strict):
    """How the fine-tune's names differ from those that the base gives the same tensors.

    Attributes:
        change: `add`: the fine-tune puts the prefix before every name of the base; `remove`: it drops
            the prefix from those that begin with it, and the others stay.
        prefix: ends in a dot.
    """

    change: Literal["add", "remove"]
    prefix: Annotated[str, Field(pattern=r"^.+\.$")]

    def text(self) -> str:
        """The scheme as people read it."""
        word = "before" if self.change == "add" else "taken from"
        return f"{self.prefix!r} {word} the base's names"


class TensorEntry(_Strict):
    """One tensor of the fine-tune that is not equal to the base's.

    Attributes:
        shape: the fine-tune's.
        dtype: the fine-tune's, as safetensors names it.
        base_shape: the base's; null where the base has no such tensor.
        sha256: of the fine-tune's bytes.
        terms: the terms' configurations; their sum is the delta.
        payload_sha256: over every part, see `docs/format.md`.
        bytes: of all parts.
        rel_error: Frobenius norm of what the terms miss over the delta's; 0 where exact.
    """

    shape: tuple[Size, ...]
    dtype: str
    base_shape: tuple[Size, ...] | None
    sha256: Sha
    terms: tuple[dict[str, Any], ...]
    payload_sha256: Sha
    bytes: Size
    rel_error: float


class FileEntry(_Strict):
    """A file of the repo. Payload shards carry no digest of their own: their tensors do."""

    bytes: Size
    sha256: Sha | None = None


class Totals(_Strict):
    """Sizes in bytes. `delta_bytes` counts every file but the card, the report and the manifest."""

    variant_bytes: Size
    delta_bytes: Size
    payload_bytes: Size
    ratio: float
    coverage: float


class Manifest(_Strict):
    """The whole of `delta_config.json`."""

    format: Literal["deltafold"] = "deltafold"
    format_version: str = "1.0"
    delta_id: Digest
    base: Origin
    variant: Origin
    created_by: str
    command: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)
    tensors: dict[str, TensorEntry]
    unchanged: tuple[str, ...] = ()
    #: Tensors that the fine-tune does not have, accepted by the user.
    absent: tuple[str, ...] = ()
    #: What differs in structure and was accepted by the user.
    accepted: tuple[str, ...] = ()
    files: dict[str, FileEntry]
    totals: Totals
    quality: dict[str, Any] = Field(default_factory=dict)
    #: Where the delta was taken against a base that is quantised so; None is the base as it is.
    base_quantization: Quantization | None = None
    #: Where the fine-tune calls the base's tensors otherwise. All names here are the fine-tune's.
    base_names: BaseNames | None = None
    #: Tensors that are one with another in the base: the fine-tune's name, and that of the other.
    untied: dict[str, str] | None = None

    def content_digest(self) -> str:
        """`sha256:<hex>` over what decides the restored model; the value of `delta_id`.

        Left out are provenance and evidence (who made it, how, how well), so that the same content
        has one identity.
        """
        content: dict[str, Any] = {
            "format": self.format,
            "major": self.format_version.split(".")[0],
            "base": self.base.fingerprint,
            "tensors": {
                name: [list(t.shape), t.dtype, list(t.terms), t.payload_sha256]
                for name, t in self.tensors.items()
            },
            "unchanged": sorted(self.unchanged),
            "absent": sorted(self.absent),
            "files": {
                name: f.sha256
                for name, f in self.files.items()
                if f.sha256 is not None and not is_evidence(name)
            },
        }
        for field in _OPTIONAL:
            if (value := getattr(self, field)) is not None:
                content[field] = value if field == "untied" else value.model_dump(mode="json")
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def to_json(self) -> dict[str, Any]:
        """The file's content. A field that is not used is left out: readers of 1.0 refuse its name."""
        data = self.model_dump(mode="json")
        for field in _OPTIONAL:
            if data[field] is None:
                del data[field]
        return data

    def codec_summary(self) -> str:
        """The default codec and the number of other codecs chosen by name, as lists show it."""
        default = str(self.recipe.get("default", "mixed"))
        tensors = self.recipe.get("tensors")
        others = {str(spec) for spec in tensors.values()} if isinstance(tensors, dict) else set()
        if not others - {default}:
            return default
        count = len(others - {default})
        return f"{default} and {count} other{'s' * (count > 1)}"


def version_for(
    quantization: Quantization | None,
    names: BaseNames | None = None,
    untied: Mapping[str, str] | None = None,
) -> str:
    """The lowest format version that can say what a manifest says."""
    if untied:
        return _UNTIED_VERSION
    if names is not None:
        return _NAMES_VERSION
    return "1.0" if quantization is None else _QUANTIZED_VERSION


def is_evidence(name: str) -> bool:
    """Files that describe a delta without being part of it."""
    return name == "README.md" or name.startswith("report/")


def parse_manifest(text: str, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        DeltafoldError: `not-a-delta` where it is something else, `newer-format` where a newer tool
            wrote it, `bad-manifest` where it breaks the schema or its own digest.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DeltafoldError("bad-manifest", f"{where} is not JSON: {error}.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DeltafoldError("not-a-delta", f'{where} does not say "format": "{FORMAT}".')
    version = str(data.get("format_version", ""))
    check_version(version, where)
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        # What a later minor version added is unknown here, and may not be passed over.
        if _numbers(version) > _numbers(FORMAT_VERSION):
            raise _newer(version, where) from error
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise DeltafoldError(
            "bad-manifest",
            f"{where} breaks the schema in {error.error_count()} places.",
            facts=[("first", f"{place}: {first['msg']}")],
            fix="pack the fine-tune again; `deltafold schema` prints what is allowed",
        ) from error
    if manifest.content_digest() != manifest.delta_id:
        raise DeltafoldError(
            "checksum",
            f"{where} was changed after it was written.",
            facts=[("delta_id", manifest.delta_id), ("content", manifest.content_digest())],
            fix="download or pack the delta again",
        )
    return manifest


def check_version(version: str, where: str) -> None:
    """Raises `newer-format` for a later major version, `bad-manifest` for what is no version."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}\.[0-9]{1,6}", version):
        raise DeltafoldError("bad-manifest", f"{where} has no format_version.")
    if _numbers(version)[0] > _numbers(FORMAT_VERSION)[0]:
        raise _newer(version, where)


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def _newer(version: str, where: str) -> DeltafoldError:
    return DeltafoldError(
        "newer-format",
        f"{where} was written by a newer deltafold.",
        facts=[("format", version), ("this version reads", FORMAT_VERSION)],
        fix="pip install --upgrade deltafold",
    )


def schema() -> dict[str, Any]:
    """The manifest's JSON schema."""
    return Manifest.model_json_schema()
