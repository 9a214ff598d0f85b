"""Which method stores which tensor.

A recipe is a default for matrices, one for vectors, and overrides by name; the last override that
matches wins. Edits change the delta of every floating-point tensor that they match before its codec
sees it. Rows that did not change are left out of any matrix where that saves bytes (`rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import yaml

from deltafold.compress.budget.goal import Budget
from deltafold.compress.edits import Edit, parse_edit
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import NEEDS, Need
from deltafold.compress.fitting import CalibrationInputs, LogitFit
from deltafold.compress.methods import BitDelta, Chain, ExactMethod, LosslessMethod, Method
from deltafold.compress.methods.base import build, parse_spec, spec_of

_KNOWN: Final = ("default", "vectors", "tensors", "edits", "budget", "fit", "calibration")
#: What a manifest's recipe says besides of where a delta comes from; nothing to do again.
_RECORDS: Final = ("merge", "family", "unshared", "provenance")


@dataclass(frozen=True)
class Recipe:
    """Choices for one packing run.

    Attributes:
        default: for floating-point tensors of two dimensions or more.
        vectors: for floating-point tensors of fewer dimensions (norms, biases). They are few bytes
            and sensitive, so they are kept exactly.
        overrides: `(pattern, method)` in order; patterns are shell globs on tensor names.
        edits: `(pattern, edit)` in the order in which they are applied.
        budget: a goal by which packing chooses the codecs of matrices that no override names, in
            place of `default`; None where the recipe says it all.
        fit: how scales are trained afterwards (`compress_and_fit`); None where they are not.
        calibration: what the run looks at, for callers that open it; packing itself does not.
    """

    default: Method = field(default_factory=lambda: BitDelta(bits=4, group=128))
    vectors: Method = field(default_factory=ExactMethod)
    overrides: tuple[tuple[str, Method], ...] = ()
    edits: tuple[tuple[str, Edit], ...] = ()
    budget: Budget | None = None
    fit: LogitFit | None = None
    calibration: CalibrationInputs | None = None

    def method_for(self, name: str, shape: tuple[int, ...], *, floating: bool) -> Method:
        """The method for one tensor. Tensors that are not floating point are kept bit for bit."""
        chosen = self.default if len(shape) >= 2 else self.vectors
        if not floating:
            chosen = LosslessMethod()
        elif isinstance(self.default, LosslessMethod) and self.vectors == ExactMethod():
            chosen = self.default
        for pattern, override in self.overrides:
            if fnmatchcase(name, pattern):
                chosen = override
        if not floating and not isinstance(chosen, ExactMethod | LosslessMethod):
            chosen = LosslessMethod()
        steps = tuple(e for p, e in self.edits if fnmatchcase(name, p)) if floating else ()
        return Chain(steps, chosen) if steps else chosen

    def overrides_for(self, name: str) -> bool:
        """Whether an override names this tensor's codec."""
        return any(fnmatchcase(name, pattern) for pattern, _ in self.overrides)

    def needs(self) -> tuple[Need, ...]:
        """All that any of its codecs and edits needs, whatever tensors they are for."""
        chosen = [self.default, self.vectors, *(m for _, m in self.overrides)]
        chosen += self.budget.candidates if self.budget else ()
        wanted = {n for m in chosen for n in m.needs}
        wanted |= {n for _, edit in self.edits for n in edit.needs}
        return tuple(n for n in NEEDS if n in wanted)

    def unused(self, names: list[str]) -> list[str]:
        """Patterns that match none of `names`: most likely a typing mistake."""
        patterns = [p for p, _ in (*self.overrides, *self.edits)]
        return [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]

    def to_json(self) -> dict[str, Any]:
        """The recipe as the manifest records it; `from_mapping` reads it back."""
        record: dict[str, Any] = {
            "default": spec_of(self.default),
            "vectors": spec_of(self.vectors),
            "tensors": self._tensors(),
        }
        if self.edits:
            record["edits"] = [e if p == "*" else f"{p}={e}" for p, e in self._edits()]
        if self.fit is not None:
            record["fit"] = self.fit.record()
        return record

    def _edits(self) -> list[tuple[str, str]]:
        return [(pattern, spec_of(edit)) for pattern, edit in self.edits]

    def _tensors(self) -> dict[str, str]:
        specs: dict[str, str] = {}
        for pattern, chosen in self.overrides:
            # A pattern given again moves to the end: the last match wins.
            specs.pop(pattern, None)
            specs[pattern] = spec_of(chosen)
        return specs

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """A recipe from parsed YAML: `default`, `vectors`, `tensors` (pattern -> codec), `edits`.

        A codec is a spec string, or a mapping with `codec` and its options. `edits` is a list of
        specs, each for all tensors or, as `PATTERN=SPEC`, for some. `budget` is a mapping with
        `target_size` or `max_kl`, and `candidates`; `fit` and `calibration` have the fields of
        `LogitFit` and `CalibrationInputs`. A manifest's recipe can be read, too, if a checkpoint was
        packed by it: one of a merge or a family is refused.
        """
        made = [key for key in _RECORDS if key in data]
        if made:
            raise DeltafoldError(
                "bad-recipe",
                f"{where}: this tells how a delta was made of others ({', '.join(made)}).",
                fix="make it again with deltafold merge, family or import-lora; a recipe packs one "
                "fine-tune",
            )
        unknown = {str(key) for key in data} - set(_KNOWN)
        if unknown:
            raise DeltafoldError(
                "bad-recipe",
                f"{where}: unknown fields {', '.join(sorted(unknown))}.",
                facts=[("known", ", ".join(_KNOWN))],
                fix="see docs/cli.md for an example",
            )
        tensors = data.get("tensors") or {}
        if not isinstance(tensors, Mapping):
            raise DeltafoldError("bad-recipe", f"{where}: `tensors` must map patterns to codecs.")
        edits = data.get("edits") or []
        if isinstance(edits, str) or not isinstance(edits, Sequence):
            raise DeltafoldError("bad-recipe", f"{where}: `edits` must be a list of edits.")
        plain = cls()
        return cls(
            default=_method(data["default"], where) if "default" in data else plain.default,
            vectors=_method(data["vectors"], where) if "vectors" in data else plain.vectors,
            overrides=tuple((str(p), _method(m, where)) for p, m in tensors.items()),
            edits=tuple(parse_edit_for(str(e)) for e in edits),
            budget=Budget.from_mapping(data["budget"], where=where) if "budget" in data else None,
            fit=LogitFit.from_mapping(data["fit"], where=where) if "fit" in data else None,
            calibration=CalibrationInputs.from_mapping(data["calibration"], where=where)
            if "calibration" in data
            else None,
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML file."""
        try:
            data = yaml.safe_load(Path(path).read_text("utf-8"))
        except OSError as error:
            raise DeltafoldError("not-found", f"{path}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DeltafoldError("bad-recipe", f"{path} is not YAML: {error}") from error
        if not isinstance(data, Mapping):
            raise DeltafoldError("bad-recipe", f"{path}: a recipe is a mapping.")
        return cls.from_mapping(data, where=str(path))


def parse_edit_for(text: str) -> tuple[str, Edit]:
    """`SPEC`, or `PATTERN=SPEC`, as the tensors that an edit is for and the edit itself.

    Raises:
        DeltafoldError: `unknown-codec` or `bad-recipe`.
    """
    # Before an option's equals sign stands the colon that ends the edit's name; patterns have none.
    head, equals, rest = text.partition("=")
    if equals and ":" not in head:
        return head.strip(), parse_edit(rest)
    return "*", parse_edit(text)


def _method(value: Any, where: str) -> Method:
    if isinstance(value, str):
        return parse_spec(value)
    if isinstance(value, Mapping) and "codec" in value:
        options = {str(k): v for k, v in value.items() if k != "codec"}
        return build(str(value["codec"]), options, where=where)
    raise DeltafoldError(
        "bad-recipe",
        f"{where}: {value!r} is not a codec.",
        fix='write e.g. "bitdelta:bits=4,group=128"',
    )
