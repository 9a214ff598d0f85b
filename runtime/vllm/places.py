"""A variant's tensors in the GPU kernels' layouts, and how much room they will need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from deltafold.compress.terms import (
    NM,
    Codebook,
    Codes,
    ColumnPlanes,
    Context,
    Encoded,
    LowRank,
    Planes,
    Term,
)
from deltafold.runtime.kernels.base import DeltaMatrix
from deltafold.runtime.kernels.forms import share_kept
from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.kernels.triton.forms import BitSlices, bit_slices
from deltafold.runtime.kernels.triton.layout import Kind, Slice, group_fits, make_slice, unlay
from deltafold.runtime.kernels.triton.sparse import BLOCK, SparseRows, sparse_rows, strata
from deltafold.runtime.kernels.whole import is_sparse, whole, whole_term
from deltafold.runtime.vllm.needs import Key, Place
from deltafold.runtime.vllm.routes import Window

_SPARSE_BELOW = 0.3
_CPU = torch.device("cpu")


def kinds_of(term: Term, shape: tuple[int, int]) -> list[Kind] | None:
    """The slices that a term becomes, from its configuration alone; None where it becomes none."""
    rows, columns = shape
    term = whole_term(term)
    if not rows * columns:
        return None
    if isinstance(term, ColumnPlanes):
        return [Kind(1, rows, columns, columns, True, torch.float32)] * term.bits
    if isinstance(term, Codebook):
        one = Kind(1, rows, columns, columns, False, torch.float32)
        return [one] * term.levels if term.levels <= 4 else None
    if not isinstance(term, Planes | Codes):
        return None
    levels = term.parts(shape)["scales"].dtype
    if isinstance(term, Planes):
        group = min(term.group, columns) if term.scale == "group" else columns
        found = [Kind(1, rows, columns, group, False, levels)] * term.bits
    else:
        group = min(term.group or columns, columns)
        low = 4 if term.bits >= 4 else 2
        signs = max(term.bits - low, 0)
        found = [Kind(low, rows, columns, group, False, levels)]
        found += [Kind(1, rows, columns, group, False, levels)] * signs
    return found if group_fits(columns, group) else None


def packed_form(
    encoded: list[Encoded],
    shape: tuple[int, int],
    context: Context,
    dtype: torch.dtype,
    window: Window,
    *,
    looks_up: bool,
) -> list[DeltaMatrix] | None:
    """A tensor's delta, or a window of it, in the GPU kernels' layouts, in host memory.

    Args:
        encoded: the terms that add up.
        shape: of the tensor.
        context: of the terms.
        dtype: of the model.
        window: this rank's part.
        looks_up: whether rows are looked up, for which there are slices alone.

    Returns:
        Forms that add up, or None where a term has no such layout.
    """
    found: list[DeltaMatrix] = []
    for each in encoded:
        form = _form(each, shape, context, dtype, window)
        if form is None or (looks_up and not isinstance(form, BitSlices)):
            return None
        found.append(form)
    return _joined(found)


def _joined(forms: list[DeltaMatrix]) -> list[DeltaMatrix] | None:
    """Factors as one pair; None where one place would have to hold two sparse forms."""
    factors = [form for form in forms if isinstance(form, Factors)]
    sparse = [form.layout for form in forms if isinstance(form, SparseRows)]
    if len(sparse) > len(set(sparse)):
        return None
    if len(factors) > 1:
        forms = [form for form in forms if not isinstance(form, Factors)]
        forms.append(
            Factors(torch.cat([f.a for f in factors]), torch.cat([f.b for f in factors], dim=1))
        )
    return forms


def _form(
    encoded: Encoded,
    shape: tuple[int, int],
    context: Context,
    dtype: torch.dtype,
    window: Window,
) -> DeltaMatrix | None:
    term, parts = encoded = whole(encoded, shape, context)
    rows = slice(window.row, window.row + window.rows)
    columns = slice(window.column, window.column + window.columns)
    if isinstance(term, Planes | Codes | ColumnPlanes | Codebook):
        if cut_kinds(kinds_of(term, shape), window) is None:
            return None
        slices = bit_slices(term, parts, shape, _CPU)
        return None if slices is None else cut_slices(slices, window)
    if isinstance(term, LowRank):
        a, b = term.factors(parts)
        return Factors(a[:, columns].to(dtype).contiguous(), b[rows].to(dtype).contiguous())
    if isinstance(term, NM) and window == Window(0, shape[0], 0, shape[1]):
        found = strata(term, parts, shape, _CPU, context.name)
        if found is not None:
            return found
    if is_sparse(term):
        delta = term.decode(parts, shape, context)
        if share_kept(term, delta) < _SPARSE_BELOW:
            return sparse_rows(window.of(delta).contiguous(), _CPU)
    return None


def cut_kinds(kinds: list[Kind] | None, window: Window) -> list[Kind] | None:
    """The kinds of a window's slices; None where it does not fall on whole groups of columns."""
    if kinds is None:
        return None
    found = []
    for kind in kinds:
        group = window.columns if kind.one_group else kind.group
        whole = window.column % group == 0 and window.columns % group == 0
        at_end = window.column + window.columns == kind.columns and window.column % group == 0
        if not (kind.one_group or whole or at_end):
            return None
        group = min(group, window.columns)
        if not group_fits(window.columns, group):
            return None
        found.append(replace(kind, rows=window.rows, columns=window.columns, group=group))
    return found


def cut_slices(form: BitSlices, window: Window) -> BitSlices:
    """Slices of a window that falls on whole groups of columns, laid out anew."""
    rows, columns = form.shape
    if window == Window(0, rows, 0, columns):
        return form
    kinds = cut_kinds([piece.kind for piece in form.slices], window)
    assert kinds is not None, window
    return BitSlices(tuple(_cut(p, k, window) for p, k in zip(form.slices, kinds, strict=True)))


def _cut(piece: Slice, kind: Kind, window: Window) -> Slice:
    fields = window.of(unlay(piece.words, piece.kind))
    first = 0 if piece.kind.one_group else window.column // piece.kind.group
    levels = piece.levels[first : first + kind.groups, window.row : window.row + window.rows]
    columns = piece.columns
    if columns is not None:
        columns = columns[window.column : window.column + window.columns].contiguous()
    return make_slice(fields, kind, levels, piece.factor, columns)


def places_of_forms(forms: Iterable[DeltaMatrix]) -> list[tuple[Key, Place]]:
    """The room that a variant's forms in one span need."""
    found: dict[Key, Place] = {}
    for form in forms:
        if isinstance(form, BitSlices):
            for piece in form.slices:
                key = piece.kind.of_blocks
                entries = found[key].entries + 1 if key in found else 1
                found[key] = Place(piece.kind.columns, piece.kind, entries)
        elif isinstance(form, SparseRows):
            assert form.layout not in found, "one sparse term a tensor"
            found[form.layout] = Place(form.columns, None, 1, len(form.places))
        else:
            assert isinstance(form, Factors), type(form)
            known = found[None].room if None in found else 0
            found[None] = Place(form.a.shape[1], None, 1, known + form.a.shape[0])
    return list(found.items())


def places_of_terms(
    terms: tuple[Term, ...], shape: tuple[int, int], window: Window, *, looks_up: bool
) -> list[tuple[Key, Place]] | None:
    """The room that `packed_form` will need, from the terms' configurations alone.

    Returns:
        None where there is no packed form.

    Raises:
        LookupError: where only the payload tells (sparse terms).
    """
    found: dict[Key, Place] = {}
    for term in terms:
        kinds = cut_kinds(kinds_of(term, shape), window)
        if kinds is not None:
            for kind in kinds:
                key = kind.of_blocks
                entries = found[key].entries + 1 if key in found else 1
                found[key] = Place(kind.columns, kind, entries)
        elif isinstance(term, LowRank) and not looks_up:
            rank = min(term.rank, *shape)
            known = found[None].room if None in found else 0
            found[None] = Place(window.columns, None, 1, known + rank)
        elif is_sparse(term) and not looks_up:
            raise LookupError(type(term).__name__)
        else:
            return None
    return list(found.items())


def list_blocks(rows: int) -> int:
    """Blocks of rows that a sparse form has."""
    return -(-rows // BLOCK)
