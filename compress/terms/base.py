"""The contract of a term: one representation of a tensor's difference to the base.

A tensor's delta is a *sum of terms*. A term is a frozen dataclass whose fields are its
configuration; that configuration goes to the manifest as JSON, its tensors ("parts") go to the
payload. From the configuration and the tensor's shape alone every part's dtype and shape follow, so
sizes are known before any work and a reader can refuse a payload that does not fit.

Rules that every term keeps:

* `decode(encode(D))` is deterministic on every machine; what is lossy is the rounding, not chance.
  (`lowrank` multiplies two factors, whose sums may differ in their last bits between machines.)
* `decode` is float32 and linear in a scale that the caller multiplies on: `W = W0 + s * decode`.
* The promised bytes (`parts`) are the written bytes.
* A term's first field set is what users choose; fields that depend on the data (`count`, lengths)
  are filled in by `encode`, which returns the term that the manifest then holds.
* An id and version may be shared by two layouts only if each decodes the other's bytes. Golden files
  under `tests/golden/` hold every id and version that was ever released.

Shape letters: N rows (output features), M columns (input features). Tensors of other ranks are read
as matrices by `rows_and_columns`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Final, NamedTuple, Protocol, Self, TypeAlias, runtime_checkable

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Evidence
from deltafold.compress.fast import Pair
from deltafold.compress.shapes import rows_and_columns

__all__ = [
    "REGISTRY",
    "Checked",
    "Context",
    "Encoded",
    "ExactTerm",
    "MeasuredTerm",
    "PartSpec",
    "Parts",
    "Term",
    "config_of",
    "is_exact",
    "register",
    "rows_and_columns",
    "term_from_config",
]

Parts: TypeAlias = Mapping[str, torch.Tensor]
#: Reads a tensor that several deltas share: the family's digest and the key in it to float32 `[R, M]`.
SharedSource: TypeAlias = Callable[[str, str], torch.Tensor]


class PartSpec(NamedTuple):
    """Dtype and shape that one part has on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the part in bytes."""
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True, slots=True)
class Context:
    """What a term may look at besides the delta itself.

    Attributes:
        name: the tensor's name in the checkpoint; seeds of random masks depend on it.
        base: the base's tensor in its own dtype, padded with zero rows up to the variant's shape,
            or None where the base has no such tensor.
        variant: the fine-tune's tensor in its own dtype; None when decoding.
        evidence: what a calibration run found out about the tensor; None without one, and when
            decoding.
        shared: where tensors that the delta shares with others are read from; None where it shares
            none.
    """

    name: str
    base: torch.Tensor | None = None
    variant: torch.Tensor | None = None
    evidence: Evidence | None = None
    shared: SharedSource | None = None


class Encoded(NamedTuple):
    """A term whose data-dependent fields are filled in, with its parts (on the CPU)."""

    term: Term
    parts: dict[str, torch.Tensor]


@runtime_checkable
class Term(Protocol):
    """One representation of a delta. Implementations are frozen dataclasses."""

    id: ClassVar[str]
    version: ClassVar[int]

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Represent `delta` (float32, any shape). Raises `DeltafoldError` where it cannot."""
        ...

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The represented difference, float32 of `shape`."""
        ...

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Every part's dtype and shape for a tensor of `shape`."""
        ...


@runtime_checkable
class ExactTerm(Term, Protocol):
    """A term that can give back the fine-tune's own tensor, bit for bit."""

    def restore(
        self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, context: Context
    ) -> torch.Tensor:
        """The fine-tune's tensor in its own dtype."""
        ...


@runtime_checkable
class MeasuredTerm(Term, Protocol):
    """A term that can tell what it misses of a matrix without decoding it to memory."""

    def missed(self, pair: Pair, parts: Parts) -> float:
        """`||D - decode||_F^2` of the difference of two matrices."""
        ...


def is_exact(term: Term) -> bool:
    """Whether `restore` gives back the fine-tune's very bytes, nested terms included."""
    inner = getattr(term, "inner", ())
    nested = inner if isinstance(inner, tuple) else (inner,)
    return isinstance(term, ExactTerm) and all(is_exact(t) for t in nested)


def config_of(term: Term) -> dict[str, Any]:
    """A term as JSON: id, version and every field, nested terms included."""
    fields: dict[str, Any] = {"id": term.id, "v": term.version}
    for f in dataclasses.fields(term):  # type: ignore[arg-type]
        fields[f.name] = _as_json(getattr(term, f.name))
    return fields


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_as_json(v) for v in value]
    return config_of(value) if isinstance(value, Term) else value


REGISTRY: Final[dict[tuple[str, int], type[Any]]] = {}


def register(cls: type[Any]) -> type[Any]:
    """Class decorator: make a term known under its id and version; a duplicate is an error."""
    key = (cls.id, cls.version)
    assert key not in REGISTRY, f"two terms share the id and version {key}"
    REGISTRY[key] = cls
    return cls


def _plugin(term_id: str, version: int) -> Callable[[], type[Any]] | None:
    for point in entry_points(group="deltafold.terms"):
        if point.name == f"{term_id}.v{version}":
            return point.load
    return None


def term_from_config(config: Mapping[str, Any], *, where: str = "") -> Term:
    """Rebuild a term from `config_of`'s JSON.

    Raises:
        DeltafoldError: `unknown-codec` for an id or version that is not installed, `bad-manifest`
            for fields that do not fit.
    """
    rest = dict(config)
    term_id, version = str(rest.pop("id", "")), rest.pop("v", None)
    cls = REGISTRY.get((term_id, version if isinstance(version, int) else -1))
    if cls is None and isinstance(version, int) and (load := _plugin(term_id, version)):
        cls = load()
    if cls is None:
        known = ", ".join(f"{i} v{v}" for i, v in sorted(REGISTRY))
        raise DeltafoldError(
            "unknown-codec",
            f"{where or 'the manifest'} uses the term {term_id!r} v{version}, "
            "which is not installed.",
            facts=[("known", known)],
            fix="upgrade deltafold, or install the package that adds this term",
        )
    return _build(cls, rest, where)


def _build(cls: type[Any], fields: dict[str, Any], where: str) -> Term:
    known = {f.name: f for f in dataclasses.fields(cls)}
    missing = sorted(set(known) - set(fields))
    if missing:
        raise DeltafoldError(
            "bad-manifest", f"{where}: the term {cls.id!r} lacks the field {missing[0]!r}."
        )
    values: dict[str, Any] = {}
    for key, value in fields.items():
        if key not in known:
            raise DeltafoldError(
                "bad-manifest", f"{where}: the term {cls.id!r} has no field {key!r}."
            )
        if isinstance(value, Mapping):
            value = term_from_config(value, where=where)
        elif isinstance(value, list):
            value = tuple(
                term_from_config(v, where=where) if isinstance(v, Mapping) else v for v in value
            )
        if not _same_type(value, known[key].default):
            raise DeltafoldError(
                "bad-manifest", f"{where}: the term {cls.id!r}: {key} cannot be {value!r}."
            )
        values[key] = value
    try:
        term: Term = cls(**values)
    except (TypeError, ValueError) as error:
        raise DeltafoldError("bad-manifest", f"{where}: {error.args[0]}") from error
    return term


def _same_type(value: Any, default: Any) -> bool:
    if default is dataclasses.MISSING:
        return True
    # JSON writes 0.0 as it likes; nothing else may stand for another type, true for 1 least of all.
    return type(value) is type(default) or (type(value) is int and type(default) is float)


class Checked:
    """Mixin for term dataclasses: `_require` in `__post_init__` names the field that is wrong."""

    def _require(self: Self, ok: bool, message: str) -> None:
        if not ok:
            raise DeltafoldError("bad-recipe", f"{type(self).__name__.lower()}: {message}")
