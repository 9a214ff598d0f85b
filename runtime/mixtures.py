"""Weighted mixtures of variants, by name: `sql*0.7+law*0.3`.

    MIXTURE    =  COMPONENT, or COMPONENT+COMPONENT+...
    COMPONENT  =  NAME, or NAME*WEIGHT

A weight is a decimal number, 1 if left out; it may be negative. A served name that itself has `*` or
`+` wins over the syntax, and cannot be a component.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from deltafold.compress.errors import DeltafoldError

_NUMBER: Final = re.compile(r"-?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})", re.ASCII)
_MOST: Final = 16


@dataclass(frozen=True)
class Mixture:
    """Names of variants and their weights, in the order in which they were given."""

    components: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        """The mixture as a request writes it."""
        return "+".join(n if w == 1 else f"{n}*{_decimal(w)}" for n, w in self.components)

    def digest(self, digests: Sequence[str]) -> str:
        """`sha256:<hex>` over the components' digests and weights, in their order."""
        pairs = [[d, w] for d, (_, w) in zip(digests, self.components, strict=True)]
        text = json.dumps(["mixture", pairs], separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def is_mixture(name: str) -> bool:
    """Whether a name may stand for a mixture."""
    return "*" in name or "+" in name


def parse_mixture(text: str) -> Mixture:
    """Take a mixture's name apart.

    Raises:
        DeltafoldError: `variant-not-found` where it is not of the form; `bad-argument` where a
            component is named twice, or there are too many.
    """
    components = []
    for part in text.split("+"):
        name, star, weight = (piece.strip() for piece in part.partition("*"))
        if not name or (star and not _NUMBER.fullmatch(weight)):
            raise DeltafoldError(
                "variant-not-found",
                f"there is no variant called {text!r}, and it is not a mixture either.",
                facts=[("component", repr(part.strip()))],
                fix="write a mixture as NAME*WEIGHT+NAME*WEIGHT, e.g. sql*0.7+law*0.3",
            )
        components.append((name, float(weight) if star else 1.0))
    return _checked(components)


def variant_name(variant: str | Mapping[str, float]) -> str:
    """A request's variant as a name: its own, or that of a mixture given as a mapping.

    Raises:
        DeltafoldError: `bad-argument` where a mapping is empty, a weight is not a number, or a name
            cannot be a component.
    """
    if isinstance(variant, str):
        return variant
    if not variant:
        raise DeltafoldError("bad-argument", "a mixture needs at least one variant.")
    for name, weight in variant.items():
        if not float("-inf") < weight < float("inf"):
            raise DeltafoldError("bad-argument", f"the weight of {name!r} must be a number.")
        if is_mixture(name):
            raise DeltafoldError(
                "bad-argument",
                f"{name!r} cannot be a component of a mixture: its name has * or + in it.",
                fix="rename its folder",
            )
    if len(variant) == 1 and next(iter(variant.values())) == 1:
        return next(iter(variant))
    return _checked([(n, float(w)) for n, w in variant.items()]).name


def _checked(components: Sequence[tuple[str, float]]) -> Mixture:
    names = [name for name, _ in components]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DeltafoldError(
            "bad-argument",
            f"{twice[0]!r} is named twice in one mixture.",
            fix="give it one weight, the sum",
        )
    if len(names) > _MOST:
        raise DeltafoldError(
            "bad-argument",
            f"a mixture of {len(names)} variants is too large; {_MOST} are the most.",
            fix="merge them into one delta: deltafold merge",
        )
    return Mixture(tuple(components))


def _decimal(weight: float) -> str:
    """A number without an exponent, whose plus sign would be taken for the next component's."""
    text = format(Decimal(repr(weight)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
