"""Digests of what all codecs, edits, families and merges give, as JSON; run by `test_library.py`."""

from __future__ import annotations

import hashlib
import json
import math

import torch
from checkpoints import bits
from test_edits import SPECS as EDITS
from test_family_methods import SPECS as FAMILIES
from test_family_methods import coded
from test_merges import SPECS as MERGES
from test_merges import merged
from test_methods import SPECS as METHODS

from deltafold.compress import parse_spec
from deltafold.compress.edits import SurveyedEdit, parse_edit
from deltafold.compress.evidence import Evidence
from deltafold.compress.merges import parse_merge
from deltafold.compress.philox import words_of
from deltafold.compress.terms import Context

SHAPE = (48, 200)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    """Float32 numbers like normal ones, the same everywhere: torch's own depend on the machine."""
    count = math.prod(shape)
    words = torch.from_numpy(words_of(4 * count, seed=seed, name="w").astype("float64"))
    return ((words.reshape(4, count) / 2**32).sum(0) - 2).reshape(shape).to(torch.float32)


def tensors() -> tuple[torch.Tensor, Context]:
    """A delta and its context."""
    base = drawn(1, *SHAPE).to(torch.bfloat16)
    variant = (base.float() + 0.01 * drawn(2, *SHAPE)).to(torch.bfloat16)
    known = Evidence(gradient=drawn(3, *SHAPE))
    return variant.float() - base.float(), Context("some.weight", base, variant, known)


def digest(*parts: torch.Tensor) -> str:
    """sha256 of some tensors' bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(bits(part))
    return found.hexdigest()


def everything() -> dict[str, str]:
    """Digests by kind and spec."""
    delta, context = tensors()
    found = {}
    for spec in METHODS:
        encoded = parse_spec(spec).encode(delta, context)
        found[f"codec {spec}"] = digest(*(e.parts[k] for e in encoded for k in sorted(e.parts)))
    for spec in EDITS:
        edit = parse_edit(spec)
        if "activations" in edit.needs:
            continue  # linear algebra, whose sums are the library's
        if isinstance(edit, SurveyedEdit):
            edit = edit.survey([("some.weight", delta)])
        found[f"edit {spec}"] = digest(edit.apply(delta, context))
    several = [drawn(seed, *SHAPE) for seed in (4, 5, 6)]
    for spec in FAMILIES:
        table, members = coded(spec, several)
        every = (e.parts[k] for terms in members for e in terms for k in sorted(e.parts))
        found[f"family {spec}"] = digest(table, *every)
    for spec in MERGES:
        found[f"merge {spec}"] = digest(merged(parse_merge(spec), several))
    return found


if __name__ == "__main__":
    print(json.dumps(everything()))
