"""Blocks of rows as the one term that they would be: what kernels multiply is a whole matrix.

Large tensors are coded in blocks of rows, to bound the memory of packing. A kernel has no use for the
cut: pieces of a matrix would take a launch each, and could not share one with other variants.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from deltafold.compress.terms import (
    NM,
    Blocks,
    Codes,
    Context,
    Encoded,
    Planes,
    Sparse,
    SparseCodes,
    Term,
)
from deltafold.compress.terms.base import Parts


def whole_term(term: Term) -> Term:
    """The term of the whole matrix, if its blocks are of one kind whose rows stand for themselves.

    Its scales are float32: blocks have units of their own, which float16 has no room for. Other terms
    are given back as they are.
    """
    if not isinstance(term, Blocks) or len(term.inner) != 1:
        return term
    inner = term.inner[0]
    if isinstance(inner, Codes) or (isinstance(inner, Planes) and inner.scale != "tensor"):
        return replace(inner, scale_format="float32")
    return term


def whole(encoded: Encoded, shape: tuple[int, ...], context: Context) -> Encoded:
    """A term with the blocks' parts below one another, or the term as it is (see `whole_term`).

    Args:
        encoded: a term of a tensor of `shape`.
        shape: of the tensor.
        context: of the term.
    """
    term, parts = encoded
    one = whole_term(term)
    if one is term:
        return encoded
    assert isinstance(term, Blocks)
    blocks = [inner for _, inner, _, _ in term.each(parts, shape, context)]
    if isinstance(one, Codes):
        codes = torch.cat([block["codes"] for block in blocks])
        return Encoded(one, {"codes": codes, "scales": torch.cat([_levels(b) for b in blocks])})
    signs = torch.cat([block["signs"] for block in blocks], dim=1)
    levels = torch.cat([_levels(block) for block in blocks], dim=1)
    return Encoded(one, {"signs": signs, "scales": levels})


def is_sparse(term: Term) -> bool:
    """Whether a term, or every block of it, keeps some entries and their places."""
    inner = term.inner if isinstance(term, Blocks) else (term,)
    return all(isinstance(each, NM | Sparse | SparseCodes) for each in inner)


def _levels(parts: Parts) -> torch.Tensor:
    """Scales float32, their unit included."""
    levels = parts["scales"].to(torch.float32)
    unit = parts.get("scales_unit")
    return levels if unit is None else levels * unit.reshape(-1, *[1] * (levels.dim() - 1))
