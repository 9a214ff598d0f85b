"""Specs: `name:key=value,key=value`, what users write for a codec, an edit or a merge.

The name is looked up in a registry, values are converted to the types of the dataclass's fields, and
`spec_of` writes back what rebuilds an object. A value in parentheses may hold commas and plus signs: a
spec within a spec, `shift-scale:vector=(svd:bits=0.5),rest=(int:bits=2)`.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Final

from deltafold.compress.errors import DeltafoldError

#: Metadata of a field that is no option: it holds what a survey of the model found.
SURVEYED: Final = {"surveyed": True}


def options_of(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a method or edit that users set."""
    return tuple(f for f in dataclasses.fields(cls) if not f.metadata.get("surveyed"))


def split_outside(text: str, separator: str) -> list[str]:
    """A text cut at every match of a pattern that no parentheses enclose."""
    depth, pieces, start = 0, [], 0
    for match in re.finditer(rf"[()]|{separator}", text):
        if match[0] in "()":
            depth += 1 if match[0] == "(" else -1
        elif not depth:
            pieces.append(text[start : match.start()])
            start = match.end()
    return [*pieces, text[start:]]


@dataclass(frozen=True)
class Kind:
    """What a spec is a spec of.

    Attributes:
        word: "codec", "edit" or "merge".
        registry: classes by id.
        group: entry point group of other packages' classes.
        flag: the option that takes such specs.
    """

    word: str
    registry: Mapping[str, type[Any]]
    group: str
    flag: str

    def find(self, name: str) -> type[Any]:
        """The class behind a name. Raises `unknown-codec`, naming those that exist."""
        if name in self.registry:
            return self.registry[name]
        for point in entry_points(group=self.group, name=name):
            loaded: type[Any] = point.load()
            return loaded
        raise DeltafoldError(
            "unknown-codec",
            f"there is no {self.word} called {name!r}.",
            facts=[("known", ", ".join(sorted(self.registry)))],
            fix="deltafold codecs",
        )

    def usage(self, name: str) -> str:
        """The option with every key and its default, as errors end."""
        cls = self.registry.get(name)
        if cls is None:
            return "deltafold codecs"
        options = ",".join(f"{f.name}={written(f.default)}" for f in options_of(cls))
        return f"{self.flag} {name}:{options}" if options else f"{self.flag} {name}"

    def parse(self, spec: str) -> Any:
        """An object from a spec.

        Raises:
            DeltafoldError: `unknown-codec`, or `bad-recipe` naming the option that is wrong.
        """
        name, _, rest = spec.strip().partition(":")
        options: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in split_outside(rest, ","))):
            key, equals, value = item.partition("=")
            if not equals:
                raise DeltafoldError(
                    "bad-recipe",
                    f"{spec!r}: {item!r} is not of the form key=value.",
                    fix=self.usage(name),
                )
            options[key.strip()] = _bare(value.strip())
        return self.build(name, options, where=spec)

    def build(self, name: str, options: Mapping[str, Any], *, where: str) -> Any:
        """An object from its name and options, values converted to the fields' types."""
        cls = self.find(name)
        hints = typing.get_type_hints(cls)
        fields = {f.name: hints[f.name] for f in options_of(cls)}
        values: dict[str, Any] = {}
        for key, value in options.items():
            if key not in fields:
                raise DeltafoldError(
                    "bad-recipe",
                    f"{where!r}: the {self.word} {name!r} has no option {key!r}.",
                    facts=[("options", ", ".join(fields) or "none")],
                    fix=self.usage(name),
                )
            values[key] = _convert(value, fields[key], where, key, self.usage(name))
        try:
            return cls(**values)
        except DeltafoldError as error:
            raise DeltafoldError(
                error.code, f"{where!r}: {error.message}", facts=error.facts, fix=self.usage(name)
            ) from error


def build_from_spec(
    spec: str, registry: Mapping[str, type[Any]], *, kind: str, group: str, flag: str
) -> Any:
    """An object from a spec and the registry of its kind. Raises as `Kind.parse`."""
    return Kind(kind, registry, group, flag).parse(spec)


def spec_of(chosen: Any) -> str:
    """The spec that rebuilds an object; options at their default are left out."""
    if hasattr(chosen, "spec"):
        return str(chosen.spec())
    options = []
    for f in options_of(chosen):
        value = getattr(chosen, f.name)
        if value != f.default:
            options.append(f"{f.name}={written(value)}")
    return str(chosen.id) + (":" + ",".join(options) if options else "")


def written(value: Any) -> str:
    """A value as specs have it: a spec within one stands in parentheses."""
    text = str(value)
    return f"({text})" if isinstance(value, str) and re.search(r"[,:+=]", text) else text


def _bare(text: str) -> str:
    return text[1:-1].strip() if text.startswith("(") and text.endswith(")") else text


#: What a type is called in errors.
_WORDS: Final = {str: "text"}


def _convert(value: Any, hint: Any, where: str, key: str, usage: str) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise DeltafoldError(
                "bad-recipe",
                f"{where!r}: {key} must be one of {', '.join(map(str, choices))}, not {value!r}.",
                fix=usage,
            )
        return value
    try:
        if hint is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        # By way of text, so that YAML's 4.5 and true are no whole numbers.
        if hint in (int, float):
            return hint(str(value))
        if hint is str and not isinstance(value, str):
            raise ValueError
    except (KeyError, ValueError) as error:
        raise DeltafoldError(
            "bad-recipe",
            f"{where!r}: {key} must be {_WORDS.get(hint, hint.__name__)}, not {value!r}.",
            fix=usage,
        ) from error
    return value
