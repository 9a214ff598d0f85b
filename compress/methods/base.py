"""The contract of a method: what users choose by name, e.g. `bitdelta:bits=4,group=128`.

A method is a frozen dataclass whose fields are its options. An *encoder* turns one tensor's delta
into a sum of terms. It declares what it needs beyond the two checkpoints (nothing, so far), where it
comes from, and how its terms are applied, so that `deltafold codecs` can print one honest table.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from importlib.metadata import entry_points
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.terms import Context, Encoded, Term


@runtime_checkable
class Method(Protocol):
    """A way to store a tensor's delta."""

    id: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[str]
    applied: ClassVar[str]

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """Terms whose sum represents a float32 delta."""
        ...

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """The terms for a tensor of `shape` and safetensors `dtype`, before any data is read."""
        ...


METHODS: Final[dict[str, type[Any]]] = {}


def method(cls: type[Any]) -> type[Any]:
    """Class decorator: make a method known under its id; a duplicate is an error."""
    assert cls.id not in METHODS, f"two methods share the id {cls.id!r}"
    METHODS[cls.id] = cls
    return cls


def method_class(name: str) -> type[Any]:
    """The method behind a name. Raises `unknown-codec`, naming those that exist."""
    if name in METHODS:
        return METHODS[name]
    for point in entry_points(group="deltafold.methods", name=name):
        loaded: type[Any] = point.load()
        return loaded
    raise DeltafoldError(
        "unknown-codec",
        f"there is no codec called {name!r}.",
        facts=[("known", ", ".join(sorted(METHODS)))],
        fix="deltafold codecs",
    )


def parse_spec(spec: str) -> Method:
    """`name:key=value,key=value` as a method, e.g. `dare:drop=0.9,seed=1`.

    Raises:
        DeltafoldError: `unknown-codec`, or `bad-recipe` naming the option that is wrong.
    """
    name, _, rest = spec.strip().partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise DeltafoldError(
                "bad-recipe", f"{spec!r}: {item!r} is not of the form key=value.", fix=_usage(name)
            )
        options[key.strip()] = value.strip()
    return build(name, options, where=spec)


def build(name: str, options: dict[str, Any], *, where: str) -> Method:
    """A method from its name and options, values converted to the fields' types."""
    cls = method_class(name)
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in fields:
            raise DeltafoldError(
                "bad-recipe",
                f"{where!r}: the codec {name!r} has no option {key!r}.",
                facts=[("options", ", ".join(fields) or "none")],
                fix=_usage(name),
            )
        values[key] = _convert(value, fields[key], where, key, name)
    try:
        built: Method = cls(**values)
    except DeltafoldError as error:
        raise DeltafoldError(
            error.code, f"{where!r}: {error.message}", facts=error.facts, fix=_usage(name)
        ) from error
    return built


def spec_of(chosen: Method) -> str:
    """The spec that rebuilds a method; options at their default are left out."""
    options = []
    for f in dataclasses.fields(chosen):  # type: ignore[arg-type]
        value = getattr(chosen, f.name)
        if value != f.default:
            text = spec_of(value).replace(",", ";") if isinstance(value, Method) else str(value)
            options.append(f"{f.name}={text}")
    return chosen.id + (":" + ",".join(options) if options else "")


def _usage(name: str) -> str:
    cls = METHODS.get(name)
    if cls is None:
        return "deltafold codecs"
    options = ",".join(f"{f.name}={f.default}" for f in dataclasses.fields(cls))
    return f"--codec {name}:{options}" if options else f"--codec {name}"


def _convert(value: Any, hint: Any, where: str, key: str, name: str) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise DeltafoldError(
                "bad-recipe",
                f"{where!r}: {key} must be one of {', '.join(map(str, choices))}, not {value!r}.",
                fix=_usage(name),
            )
        return value
    try:
        if hint is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        # By way of text, so that YAML's 4.5 and true are no whole numbers.
        if hint in (int, float):
            return hint(str(value))
    except (KeyError, ValueError) as error:
        raise DeltafoldError(
            "bad-recipe",
            f"{where!r}: {key} must be {hint.__name__}, not {value!r}.",
            fix=_usage(name),
        ) from error
    return value
