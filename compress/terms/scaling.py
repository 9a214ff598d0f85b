"""A stored term times a number, without decoding it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from deltafold.compress.terms.banded import Banded
from deltafold.compress.terms.base import Encoded, Term, is_exact
from deltafold.compress.terms.blocks import Blocks
from deltafold.compress.terms.columns import Columns
from deltafold.compress.terms.lowrank import LowRank
from deltafold.compress.terms.rows import Rows
from deltafold.compress.terms.shared import Shared

#: Parts in which decoding is linear, by the last word of their key.
_LINEAR: Final = ("scales", "table", "values", "means")
_UNIT: Final = "_unit"


def scaled(encoded: Encoded, factor: float) -> Encoded:
    """The same term, all that it decodes to times a factor.

    Float16 numbers stay as they are where a unit stands beside them. Added rows are values, not
    differences, and stay too. An exact term holds the fine-tune's own tensor: it must not come here.
    """
    term, parts = encoded
    assert not is_exact(term), "an exact term cannot be scaled"
    if isinstance(term, Shared):
        changed: Any = term
        product = torch.tensor(term.scale * factor, dtype=torch.float32)
        return Encoded(replace(changed, scale=product.item()), parts)
    found = dict(parts)
    for key in _linear(term, parts):
        place = f"{key}{_UNIT}" if f"{key}{_UNIT}" in parts else key
        found[place] = (parts[place].to(torch.float64) * factor).to(parts[place].dtype)
    return Encoded(term, found)


def _linear(term: Term, parts: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Keys of the parts of which exactly one enters each product."""
    if isinstance(term, Rows | Columns):
        yield from _nested(term.inner, parts, "inner.")
    elif isinstance(term, Blocks):
        numbers = {int(key.partition(".")[0]) for key in parts}
        for number in sorted(numbers):
            inner = term.inner[number if len(term.inner) > 1 else 0]
            yield from _nested(inner, parts, f"{number}.")
    elif isinstance(term, LowRank):
        yield "b"
    else:
        for key in parts:
            # Of a product of two factors one is enough.
            second = not isinstance(term, Banded) or key.startswith("b")
            if second and key.rpartition(".")[2] in _LINEAR:
                yield key


def _nested(inner: Term, parts: Mapping[str, torch.Tensor], prefix: str) -> Iterator[str]:
    own = {k.removeprefix(prefix): p for k, p in parts.items() if k.startswith(prefix)}
    assert not isinstance(inner, Shared), "shared terms stand by themselves"
    yield from (prefix + key for key in _linear(inner, own))
