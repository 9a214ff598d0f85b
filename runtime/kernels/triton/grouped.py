"""Deltas of one layer, or of several with the same input, for all variants of a batch: a launch for
each layout that is in use.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

from deltafold.runtime.kernels.base import DeltaMatrix, leaves
from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.kernels.triton import dense, sparse
from deltafold.runtime.kernels.triton import forms as slices
from deltafold.runtime.kernels.triton.dense import DenseTable, add_dense, make_dense_table
from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.launch import add_slices
from deltafold.runtime.kernels.triton.layout import Kind
from deltafold.runtime.kernels.triton.lookup import add_rows
from deltafold.runtime.kernels.triton.lowrank import FactorTable, add_factors, make_factor_table
from deltafold.runtime.kernels.triton.parts import MOST_PARTS
from deltafold.runtime.kernels.triton.segments import Segments
from deltafold.runtime.kernels.triton.sparse import (
    SparseRows,
    SparseTable,
    add_sparse,
    make_sparse_table,
)
from deltafold.runtime.kernels.triton.table import ByPart, SliceTable, make_table

#: One variant's form of each part of a layer.
Forms: TypeAlias = Sequence[DeltaMatrix | None]
_Held: TypeAlias = "weakref.ref[DeltaMatrix] | None"
#: What shares a launch: a kind of slices, a layout of sparse rows, or one of these.
_Key: TypeAlias = Kind | tuple[int, int] | Literal["low rank", "dense"]
_Table: TypeAlias = SliceTable | SparseTable | FactorTable | DenseTable


def groupable(form: DeltaMatrix, rows: int, dtype: torch.dtype, longest: int) -> bool:
    """Whether the kernels can apply a form together with other variants' forms.

    Args:
        form: of one variant.
        rows: N of the layer. Slices may have others, where a variant has another vocabulary.
        dtype: of the activations.
        longest: most tokens of one variant; many are faster by a rebuilt matrix.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(_fits(leaf, rows, dtype, longest) for leaf, _ in leaves(form))


def _fits(leaf: DeltaMatrix, rows: int, dtype: torch.dtype, longest: int) -> bool:
    if isinstance(leaf, BitSlices):
        return longest <= slices.REBUILD_ABOVE
    if isinstance(leaf, SparseRows):
        return leaf.rows == rows and longest <= sparse.REBUILD_ABOVE
    if isinstance(leaf, Dense):
        fits = leaf.weight.is_contiguous() and leaf.weight.dtype == dtype
        return fits and leaf.weight.shape[0] == rows and longest <= dense.REBUILD_ABOVE
    if not isinstance(leaf, Factors):
        return False
    whole = leaf.a.is_contiguous() and leaf.b.is_contiguous()
    return whole and leaf.a.dtype == leaf.b.dtype == dtype and leaf.b.shape[0] == rows


class SlotTables:
    """Tables of the forms of a layer, or of several that read the same input, by part and slot; kept
    as long as the variants in the slots stay.

    Forms are held weakly: dropping a variant frees its memory, and its slot's addresses are not read
    until another variant has the slot.

    Args:
        parts: outputs of the layer, up to `MOST_PARTS`.
    """

    def __init__(self, parts: int = 1) -> None:
        assert 0 < parts <= MOST_PARTS, parts
        self.parts = parts
        self._known: list[tuple[_Held, ...]] = []
        self._keys: list[frozenset[_Key]] = []
        self._tables: dict[_Key, tuple[tuple[int, ...], _Table]] = {}

    def used(
        self, forms: Mapping[int, Forms], capacity: int, device: torch.device
    ) -> list[tuple[tuple[int, ...], _Table]]:
        """The tables that these slots need, each with the parts that have something in it.

        Args:
            forms: every slot of the batch with its variant's form for each part, or None.
            capacity: how many slots there are.
            device: of the forms.
        """
        changed = len(self._known) != capacity
        self._known += [(None,) * self.parts] * (capacity - len(self._known))
        for slot, given in forms.items():
            assert len(given) == self.parts, len(given)
            # A slot may have had another variant before, whose addresses must not be read.
            if any(_live(h) is not f for h, f in zip(self._known[slot], given, strict=True)):
                self._known[slot] = tuple(None if f is None else weakref.ref(f) for f in given)
                changed = True
        if changed:
            self._fill(device)
        keys = {key for slot in forms for key in self._keys[slot]}
        return [table for key, table in self._tables.items() if key in keys]

    def _fill(self, device: torch.device) -> None:
        by_key: dict[_Key, list[list[list[tuple[Any, float]]]]] = {}
        self._keys = []
        for slot, held in enumerate(self._known):
            keys = set()
            for part, form in enumerate(map(_live, held)):
                for key, piece, weight in _pieces(form):
                    every = by_key.setdefault(
                        key, [[[] for _ in self._known] for _ in range(self.parts)]
                    )
                    every[part][slot].append((piece, weight))
                    keys.add(key)
            self._keys.append(frozenset(keys))
        self._tables = {}
        for key, every in by_key.items():
            # Parts that have nothing of a kind take no part in its launch.
            parts = tuple(p for p, slots in enumerate(every) if any(slots))
            self._tables[key] = parts, _table(key, [every[p] for p in parts], device)


class GroupedProducts:
    """Products of one layer, or of several that read the same input.

    Args:
        parts: outputs of the layer, up to `MOST_PARTS`.
    """

    def __init__(self, parts: int = 1) -> None:
        self._tables = SlotTables(parts)

    def add(
        self,
        ys: Sequence[torch.Tensor],
        x: torch.Tensor,
        forms: Mapping[int, Forms],
        segments: Segments,
        capacity: int,
    ) -> None:
        """`y_p[t] += s[t] * x[t] D_p^T` with the forms of token t's slot, each part p by itself.

        Args:
            ys: an output `[T, N_p]` for each part, changed in place; tokens of the base are not
                touched, nor are columns beyond a form's rows.
            x: `[T, M]`.
            forms: every slot of the batch with its variant's form for each part, which is
                `groupable`, or None.
            segments: which slot each token has.
            capacity: how many slots there are.
        """
        assert len(ys) == self._tables.parts, len(ys)
        for parts, table in self._tables.used(forms, capacity, x.device):
            mine = [ys[part] for part in parts]
            if isinstance(table, SliceTable):
                add_slices(mine, x, table, segments)
            elif isinstance(table, SparseTable):
                add_sparse(mine, x, table, segments)
            elif isinstance(table, DenseTable):
                add_dense(mine, x, table, segments)
            else:
                add_factors(mine, x, table, segments)


class GroupedRows:
    """Rows of tables (embeddings), decoded as tokens ask for them."""

    def __init__(self) -> None:
        self._tables = SlotTables()

    def add(
        self,
        y: torch.Tensor,
        ids: torch.Tensor,
        forms: Mapping[int, DeltaMatrix | None],
        segments: Segments,
        capacity: int,
    ) -> None:
        """`y[t] += s[t] * D[ids[t]]` with the form of token t's slot.

        Args:
            y: `[T, M]`, changed in place; tokens of the base are not touched.
            ids: int64 `[T]`; those beyond a form's rows get its last row.
            forms: every slot of the batch with its variant's form, which has `sliced_rows`, or None.
            segments: which slot each token has.
            capacity: how many slots there are.
        """
        by_slot = {slot: (form,) for slot, form in forms.items()}
        for _, table in self._tables.used(by_slot, capacity, y.device):
            assert isinstance(table, SliceTable), type(table)
            add_rows(y, ids, table, segments)


def sliced_rows(form: DeltaMatrix) -> bool:
    """Whether rows of a form can be looked up together with those of other variants."""
    return all(isinstance(leaf, BitSlices) for leaf, _ in leaves(form))


def rows_of(form: DeltaMatrix, otherwise: int) -> int:
    """Rows of a form's slices, if it has any."""
    known = [leaf.shape[0] for leaf, _ in leaves(form) if isinstance(leaf, BitSlices)]
    return known[0] if known else otherwise


def _live(held: _Held) -> DeltaMatrix | None:
    return None if held is None else held()


def _pieces(form: DeltaMatrix | None) -> list[tuple[_Key, Any, float]]:
    """What a form consists of, by what can share a launch."""
    found: list[tuple[_Key, Any, float]] = []
    for leaf, weight in [] if form is None else leaves(form):
        if isinstance(leaf, BitSlices):
            found += [(piece.kind.of_blocks, piece, weight) for piece in leaf.slices]
        elif isinstance(leaf, SparseRows):
            found.append((leaf.layout, leaf, weight))
        elif isinstance(leaf, Dense):
            found.append(("dense", leaf, weight))
        else:
            assert isinstance(leaf, Factors), type(leaf)
            found.append(("low rank", leaf, weight))
    return found


def _table(key: _Key, by_part: ByPart[Any], device: torch.device) -> _Table:
    if isinstance(key, Kind):
        return make_table(key, by_part, device)
    if isinstance(key, tuple):
        return make_sparse_table(by_part, device)
    if key == "dense":
        return make_dense_table(by_part, device)
    return make_factor_table(by_part, device)
