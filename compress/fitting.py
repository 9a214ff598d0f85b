"""What a run learns from, and how scales are trained: parts of a recipe that go with data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from deltafold.compress.errors import DeltafoldError


@dataclass(frozen=True)
class LogitFit:
    """How scales are trained.

    Attributes:
        steps: optimizer steps.
        lr: Adam's rate at the start; a cosine takes it to zero. For scales in units of the weights;
            0 takes 1e-4, and 0.01 for factors.
        batch: rows of a step.
        length: most tokens of a row; longer ones are cut into several.
        what: all `scales`, or for the whole model one factor for each of a tensor's `terms`: two for
            `shift-scale`, after arXiv 2505.11344.
    """

    steps: int = 200
    lr: float = 0.0
    batch: int = 4
    length: int = 128
    what: Literal["scales", "terms"] = "scales"

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr >= 0 or self.batch < 1 or self.length < 2:
            raise DeltafoldError(
                "bad-argument", "scales are fitted in at least one step, with a rate above 0."
            )
        if self.what not in ("scales", "terms"):
            raise DeltafoldError("bad-argument", f"fit scales or terms, not {self.what!r}.")

    def record(self) -> dict[str, Any]:
        """What a manifest says about it."""
        return {
            "what": self.what,
            "steps": self.steps,
            "lr": self.rate,
            "batch": self.batch,
            "length": self.length,
        }

    @property
    def rate(self) -> float:
        """The rate that is used."""
        return self.lr or {"scales": 1e-4, "terms": 1e-2}[self.what]

    @classmethod
    def from_mapping(cls, data: Any, *, where: str) -> Self:
        """From YAML: any of `what`, `steps`, `lr`, `batch` and `length`. Raises `bad-recipe`."""
        return cls(**_checked(cls, data, "fit", where))


@dataclass(frozen=True)
class CalibrationInputs:
    """Files and checkpoints that a run looks at; named in a recipe file, never in a manifest's.

    Attributes:
        file: examples of the task; see `read_calibration`.
        safe: harmful prompts with safe answers.
        rows: most rows.
        length: most tokens of a row.
        references: other checkpoints, each `ROLE=MODEL`.
    """

    file: str = ""
    safe: str = ""
    rows: int = 64
    length: int = 512
    references: tuple[str, ...] = ()

    @classmethod
    def from_mapping(cls, data: Any, *, where: str) -> Self:
        """From YAML: any of the fields; `references` is a list. Raises `bad-recipe`."""
        found = _checked(cls, data, "calibration", where)
        if "references" in found:
            found["references"] = tuple(found["references"])
        return cls(**found)


def _checked(cls: type[Any], data: Any, key: str, where: str) -> dict[str, Any]:
    """The mapping, whose keys are the class's fields and whose values have their defaults' types."""
    wanted = {f.name: f.default for f in fields(cls)}
    if not isinstance(data, Mapping) or not set(map(str, data)) <= set(wanted):
        raise DeltafoldError(
            "bad-recipe",
            f"{where}: `{key}` cannot be {data!r}.",
            facts=[("known", ", ".join(wanted))],
            fix="see docs/cli.md for an example",
        )
    for name, value in data.items():
        kinds = {float: (int, float), tuple: (list, tuple)}.get(
            type(wanted[name]), (type(wanted[name]),)
        )
        parts = value if isinstance(value, list | tuple) else ()
        if (
            isinstance(value, bool)
            or not isinstance(value, kinds)
            or not all(isinstance(part, str) for part in parts)
        ):
            raise DeltafoldError("bad-recipe", f"{where}: {key}.{name} cannot be {value!r}.")
    return dict(data)
