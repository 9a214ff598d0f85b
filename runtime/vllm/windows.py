"""Forms for a part of a tensor: what a tensor-parallel rank or a shard of a merged layer holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from deltafold.compress.terms import Context, Encoded
from deltafold.runtime.kernels.base import DeltaMatrix, Sum
from deltafold.runtime.kernels.forms import Target, product_form
from deltafold.runtime.kernels.reference import Dense, RowSubset
from deltafold.runtime.kernels.signs import SignWords
from deltafold.runtime.kernels.simple import Csr, Factors, csr
from deltafold.runtime.vllm.routes import Window

_ROWS = 32


def windowed_form(
    encoded: list[Encoded],
    shape: tuple[int, int],
    context: Context,
    target: Target,
    window: Window,
) -> DeltaMatrix:
    """The form for `x @ D[window]^T`, packed where the window falls on the packing's borders."""
    if window == Window(0, shape[0], 0, shape[1]):
        return product_form(encoded, shape, context, target)
    forms = []
    for each in encoded:
        form = cut(product_form([each], shape, context, target), window)
        if form is None:
            part = window.of(each.term.decode(each.parts, shape, context).reshape(shape))
            form = Dense(part.to(target.device, target.dtype).contiguous())
        forms.append(form)
    return forms[0] if len(forms) == 1 else Sum(forms)


def cut(form: DeltaMatrix, window: Window) -> DeltaMatrix | None:
    """A part of a form in memory of its own; None where its layout cannot be cut there."""
    rows = slice(window.row, window.row + window.rows)
    columns = slice(window.column, window.column + window.columns)
    if isinstance(form, Dense):
        return Dense(form.weight[rows, columns].clone())
    if isinstance(form, Factors):
        return Factors(form.a[:, columns].clone(), form.b[rows].clone())
    if isinstance(form, Csr):
        return csr(form.matrix.to_dense()[rows, columns].contiguous(), form.matrix.device)
    if isinstance(form, RowSubset):
        inside = (form.index >= window.row) & (form.index < window.row + window.rows)
        inner = Dense(form.inner.weight[inside][:, columns].clone())
        return RowSubset(form.index[inside] - window.row, inner, window.rows)
    if isinstance(form, SignWords):
        return _cut_words(form, window)
    return None


def _cut_words(form: SignWords, window: Window) -> SignWords | None:
    """Whole blocks of 32 rows and whole groups of columns."""
    _, groups, _ = form.levels.shape
    last_row = window.row + window.rows
    last_column = window.column + window.columns
    if window.row % _ROWS or (last_row % _ROWS and last_row != form.rows):
        return None
    if window.column % form.width or (last_column % form.width and last_column != form.columns):
        return None
    blocks = slice(window.row // _ROWS, -(-last_row // _ROWS))
    first, last = window.column // form.width, -(-last_column // form.width)
    each = form.words.shape[2] // groups
    padded = slice(window.row, -(-last_row // _ROWS) * _ROWS)
    return dataclasses.replace(
        form,
        words=form.words[:, blocks, first * each : last * each].contiguous(),
        levels=form.levels[:, first:last, padded].contiguous(),
        offsets=None if form.offsets is None else form.offsets[first:last, padded].contiguous(),
        rows=window.rows,
        columns=window.columns,
    )


@dataclass(frozen=True)
class Piece:
    """A form for some of a layer's output rows.

    Attributes:
        row: the first of them.
        rows: how many.
        form: `[rows, columns of the layer]`.
    """

    row: int
    rows: int
    form: DeltaMatrix


@dataclass(frozen=True)
class TablePiece:
    """Rows of a table that this rank holds: local row `i` is row `i + shift` of the form's matrix.

    Attributes:
        rows: local rows `[0, rows)` are served; later ones are padding.
        shift: see above.
        form: the whole matrix, rows of which are looked up.
    """

    rows: int
    shift: int
    form: DeltaMatrix

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows for local ids; ids beyond the table are masked by the caller and get any row."""
        return self.form.gather(ids.clamp_max(self.rows - 1) + self.shift)
