"""From stored terms to the form that this device applies best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltafold.compress.terms import (
    NM,
    Banded,
    Blocks,
    Codebook,
    Codes,
    ColumnPlanes,
    Columns,
    Context,
    Encoded,
    LowRank,
    Planes,
    Rows,
    Shared,
    Sparse,
    SparseCodes,
    Term,
    rows_and_columns,
)
from deltafold.compress.terms.base import Parts
from deltafold.runtime.kernels.base import DeltaMatrix, Stacked, Sum
from deltafold.runtime.kernels.cpu import codes_forms, planes_forms
from deltafold.runtime.kernels.devices import applies_packed
from deltafold.runtime.kernels.reference import Dense, RowSubset
from deltafold.runtime.kernels.shared import shared_rows
from deltafold.runtime.kernels.signs import (
    codebook_words,
    codes_words,
    column_words,
    planes_words,
)
from deltafold.runtime.kernels.simple import ColumnSubset, Factors, csr
from deltafold.runtime.kernels.tables import TABLES, PackedTable
from deltafold.runtime.kernels.whole import is_sparse, whole

#: Below this share of entries kept, compressed rows beat a dense product on a CPU, unless the matrix
#: is so small that the call costs more than the product.
_SPARSE_BELOW = 0.3
_SPARSE_FROM = 2**18
#: More planes than this read more memory packed than a dense bfloat16 copy does.
_MOST_PLANES = 4


@dataclass(frozen=True, slots=True)
class Target:
    """Where and in which dtype a model runs."""

    device: torch.device
    dtype: torch.dtype


def product_form(
    encoded: list[Encoded], shape: tuple[int, ...], context: Context, target: Target
) -> DeltaMatrix:
    """The form for `x @ D^T` (linear layers, lm_head)."""
    matrix = rows_and_columns(shape)
    return _sum([_product(e, matrix, shape, context, target) for e in encoded])


def table_form(
    encoded: list[Encoded], shape: tuple[int, ...], context: Context, target: Target
) -> DeltaMatrix:
    """The form for looking up rows (embeddings)."""
    return _sum([_table(e, shape, context, target) for e in encoded])


def _sum(forms: list[DeltaMatrix]) -> DeltaMatrix:
    dense = [form.weight for form in forms if isinstance(form, Dense)]
    if len(dense) > 1:
        # One copy and one product instead of several.
        total = torch.stack([weight.to(torch.float32) for weight in dense]).sum(0)
        rest = [form for form in forms if not isinstance(form, Dense)]
        forms = [*rest, Dense(total.to(dense[0].dtype))]
    return forms[0] if len(forms) == 1 else Sum(forms)


def _product(
    encoded: Encoded,
    matrix: tuple[int, int],
    shape: tuple[int, ...],
    context: Context,
    target: Target,
) -> DeltaMatrix:
    encoded = whole(encoded, shape, context)
    term, parts = encoded
    packed_here = applies_packed(target.device)
    if isinstance(term, Blocks) and not (packed_here and is_sparse(term)):
        blocks = term.each(parts, shape, context)
        forms = [_product(Encoded(t, p), s, s, c, target) for t, p, s, c in blocks]
        return Stacked(forms, term.rows)
    if packed_here:
        form = _on_gpu(encoded, matrix, shape, context, target)
        if form is not None:
            return form
    if isinstance(term, Planes | Codes) and target.device.type == "cpu":
        packed = _packed(term, parts, matrix, target.dtype)
        if packed is not None:
            return packed
    if isinstance(term, ColumnPlanes | Codebook) and target.device.type == "cpu":
        words = _words(term, parts, matrix)
        if words is not None:
            return words
    if isinstance(term, LowRank) or (isinstance(term, Banded) and _is_thin(term, shape)):
        return _factors(term, parts, shape, context, target)
    if isinstance(term, Rows):
        return _row_subset(term, encoded, shape, context, target)
    if isinstance(term, Shared):
        return shared_rows(term, parts, matrix, context, target.device, target.dtype)
    if isinstance(term, Columns):
        index = term.index(parts, matrix[1], context.name).to(target.device)
        chosen = term.chosen(parts, matrix[0], context.name)
        return ColumnSubset(index, chosen.to(target.device, target.dtype), matrix[1])
    delta = term.decode(parts, shape, context).reshape(matrix)
    return form_of_delta(delta, share_kept(term, delta), target)


def form_of_delta(delta: torch.Tensor, share: float, target: Target) -> DeltaMatrix:
    """The form of a decoded float32 delta `[N, M]` that keeps a share of its entries."""
    if share < _SPARSE_BELOW and applies_packed(target.device):
        from deltafold.runtime.kernels.triton.sparse import sparse_rows

        found = sparse_rows(delta, target.device)
        if found is not None:
            return found
    elif share < _SPARSE_BELOW and target.device.type == "cpu" and delta.numel() >= _SPARSE_FROM:
        return csr(delta, target.device)
    return Dense(delta.to(target.device, target.dtype))


def _on_gpu(
    encoded: Encoded,
    matrix: tuple[int, int],
    shape: tuple[int, ...],
    context: Context,
    target: Target,
) -> DeltaMatrix | None:
    """The form for our GPU kernels, or None where they have none."""
    from deltafold.runtime.kernels.triton.forms import bit_slices
    from deltafold.runtime.kernels.triton.sparse import strata

    term, parts = encoded
    if isinstance(term, Planes | Codes | ColumnPlanes | Codebook):
        return bit_slices(term, parts, matrix, target.device)
    if isinstance(term, NM):
        return strata(term, parts, matrix, target.device, context.name)
    return None


def _words(
    term: ColumnPlanes | Codebook, parts: Parts, matrix: tuple[int, int]
) -> DeltaMatrix | None:
    if isinstance(term, ColumnPlanes):
        return column_words(term, parts, matrix) if term.bits <= _MOST_PLANES else None
    return codebook_words(term, parts, matrix) if term.levels <= _MOST_PLANES else None


def _is_thin(term: Banded, shape: tuple[int, ...]) -> bool:
    """Whether two products by the factors cost less than one by the matrix."""
    rows, columns = rows_and_columns(shape)
    return term.rank(shape) * (rows + columns) < rows * columns


def _factors(
    term: LowRank | Banded, parts: Parts, shape: tuple[int, ...], context: Context, target: Target
) -> Factors:
    if isinstance(term, Banded):
        a, b = term.factors(parts, shape, context)
    else:
        a, b = term.factors(parts)
    return Factors(a.to(target.device, target.dtype), b.to(target.device, target.dtype))


def _packed(
    term: Planes | Codes, parts: Parts, matrix: tuple[int, int], dtype: torch.dtype
) -> DeltaMatrix | None:
    """Our own kernel where this machine has it, else torch's int4 product where that is fast."""
    if isinstance(term, Codes):
        words = codes_words(term, parts, matrix)
    else:
        words = planes_words(term, parts, matrix)
    if words is not None:
        return words
    if dtype != torch.bfloat16:
        return None
    if isinstance(term, Codes):
        forms = codes_forms(term, parts, matrix)
    else:
        forms = planes_forms(term, parts, matrix) if term.bits <= _MOST_PLANES else None
    return None if forms is None else _sum(list(forms))


def _row_subset(
    term: Rows, encoded: Encoded, shape: tuple[int, ...], context: Context, target: Target
) -> RowSubset:
    delta = term.decode(encoded.parts, shape, context).reshape(shape[0], -1)
    index = encoded.parts["index"].long()
    if term.added:
        index = torch.cat([index, torch.arange(shape[0] - term.added, shape[0])])
    inner = Dense(delta[index].to(target.device, target.dtype))
    return RowSubset(index.to(target.device), inner, shape[0])


def _table(
    encoded: Encoded, shape: tuple[int, ...], context: Context, target: Target
) -> DeltaMatrix:
    if applies_packed(target.device):
        # On a CPU blocks stay where they are, in the mapped file.
        encoded = whole(encoded, shape, context)
    term, parts = encoded
    if isinstance(term, Blocks):
        blocks = term.each(parts, shape, context)
        forms = [_table(Encoded(t, p), s, c, target) for t, p, s, c in blocks]
        return Stacked(forms, term.rows)
    if isinstance(term, Planes | Codes | ColumnPlanes | Codebook) and applies_packed(target.device):
        from deltafold.runtime.kernels.triton.forms import bit_slices

        slices = bit_slices(term, parts, rows_and_columns(shape), target.device)
        if slices is not None:
            return slices
    if isinstance(term, TABLES) and len(shape) == 2 and target.device.type == "cpu":
        return PackedTable(term, dict(parts), shape[1], target.dtype, target.device)
    if isinstance(term, Rows):
        return _row_subset(term, encoded, shape, context, target)
    if isinstance(term, LowRank) or (isinstance(term, Banded) and _is_thin(term, shape)):
        return _factors(term, parts, shape, context, target)
    matrix = rows_and_columns(shape)
    if isinstance(term, Shared):
        return shared_rows(term, parts, matrix, context, target.device, target.dtype)
    delta = term.decode(parts, shape, context).reshape(matrix)
    if _is_sparse(term, delta):
        return csr(delta, target.device)
    return Dense(delta.to(target.device, target.dtype))


def _is_sparse(term: Term, delta: torch.Tensor) -> bool:
    return share_kept(term, delta) < _SPARSE_BELOW and delta.numel() >= _SPARSE_FROM


def share_kept(term: Term, delta: torch.Tensor) -> float:
    """The share of a delta's entries that a term keeps."""
    if isinstance(term, NM):
        return term.keep / term.of
    if isinstance(term, Sparse | SparseCodes):
        return term.count / max(delta.numel(), 1)
    if isinstance(term, Blocks) and is_sparse(term):
        return int(delta.count_nonzero()) / max(delta.numel(), 1)
    return 1.0
