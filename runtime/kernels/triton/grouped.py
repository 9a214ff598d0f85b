"""One layer's deltas for all variants of a batch: a launch for each layout that is in use."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import torch

from deltafold.runtime.kernels.base import DeltaMatrix, leaves
from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.kernels.triton import forms as slices
from deltafold.runtime.kernels.triton import sparse
from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.launch import add_slices
from deltafold.runtime.kernels.triton.layout import Kind
from deltafold.runtime.kernels.triton.lowrank import FactorTable, add_factors, make_factor_table
from deltafold.runtime.kernels.triton.segments import Segments
from deltafold.runtime.kernels.triton.sparse import (
    SparseRows,
    SparseTable,
    add_sparse,
    make_sparse_table,
)
from deltafold.runtime.kernels.triton.table import SliceTable, make_table

#: What shares a launch: a kind of slices, a layout of sparse rows, or low rank.
_Key: TypeAlias = Kind | tuple[int, int] | None
_LOW_RANK: Final = None
_Table: TypeAlias = SliceTable | SparseTable | FactorTable


def groupable(form: DeltaMatrix, rows: int, dtype: torch.dtype, longest: int) -> bool:
    """Whether the kernels can apply a form together with other variants' forms.

    Args:
        form: of one variant.
        rows: N of the layer; a variant with another vocabulary goes by itself.
        dtype: of the activations.
        longest: most tokens of one variant; many are faster by a rebuilt matrix.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(_fits(leaf, rows, dtype, longest) for leaf, _ in leaves(form))


def _fits(leaf: DeltaMatrix, rows: int, dtype: torch.dtype, longest: int) -> bool:
    if isinstance(leaf, BitSlices):
        return leaf.shape[0] == rows and longest <= slices.REBUILD_ABOVE
    if isinstance(leaf, SparseRows):
        return leaf.rows == rows and longest <= sparse.REBUILD_ABOVE
    if not isinstance(leaf, Factors):
        return False
    whole = leaf.a.is_contiguous() and leaf.b.is_contiguous()
    return whole and leaf.a.dtype == leaf.b.dtype == dtype and leaf.b.shape[0] == rows


class GroupedProducts:
    """Tables of one layer's forms by slot, kept as long as the variants in the slots stay.

    Forms are held weakly: dropping a variant frees its memory, and its slot's addresses are not read
    until another variant has the slot.
    """

    def __init__(self) -> None:
        self._known: list[weakref.ref[DeltaMatrix] | None] = []
        self._keys: list[frozenset[_Key]] = []
        self._tables: dict[_Key, _Table] = {}

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        forms: Mapping[int, DeltaMatrix | None],
        segments: Segments,
        capacity: int,
    ) -> None:
        """`y[t] += s[t] * x[t] D^T` with the form of token t's slot.

        Args:
            y: `[T, N]`, changed in place; tokens of the base are not touched.
            x: `[T, M]`.
            forms: every slot of the batch with its variant's form, which is `groupable`, or None.
            segments: which slot each token has.
            capacity: how many slots there are.
        """
        self._refresh(forms, capacity, x.device)
        used = {key for slot in forms for key in self._keys[slot]}
        for key, table in self._tables.items():
            if key not in used:
                continue
            if isinstance(table, SliceTable):
                add_slices(y, x, table, segments)
            elif isinstance(table, SparseTable):
                add_sparse(y, x, table, segments)
            else:
                add_factors(y, x, table, segments)

    def _refresh(
        self, forms: Mapping[int, DeltaMatrix | None], capacity: int, device: torch.device
    ) -> None:
        changed = len(self._known) != capacity
        self._known += [None] * (capacity - len(self._known))
        for slot, form in forms.items():
            held = self._known[slot]
            if form is None and held is not None:
                # The slot had another variant before, whose addresses must not be read.
                self._known[slot], changed = None, True
            elif form is not None and (held is None or held() is not form):
                self._known[slot], changed = weakref.ref(form), True
        if changed:
            self._fill(device)

    def _fill(self, device: torch.device) -> None:
        live = [None if held is None else held() for held in self._known]
        by_key: dict[_Key, list[list[tuple[Any, float]]]] = {}
        self._keys = []
        for slot, form in enumerate(live):
            keys = set()
            for key, piece, weight in _pieces(form):
                rows = by_key.setdefault(key, [[] for _ in live])
                rows[slot].append((piece, weight))
                keys.add(key)
            self._keys.append(frozenset(keys))
        self._tables = {key: _table(key, rows, device) for key, rows in by_key.items()}


def _pieces(form: DeltaMatrix | None) -> list[tuple[_Key, Any, float]]:
    """What a form consists of, by what can share a launch."""
    found: list[tuple[_Key, Any, float]] = []
    for leaf, weight in [] if form is None else leaves(form):
        if isinstance(leaf, BitSlices):
            found += [(piece.kind, piece, weight) for piece in leaf.slices]
        elif isinstance(leaf, SparseRows):
            found.append((leaf.layout, leaf, weight))
        else:
            assert isinstance(leaf, Factors), type(leaf)
            found.append((_LOW_RANK, leaf, weight))
    return found


def _table(key: _Key, by_slot: list[list[tuple[Any, float]]], device: torch.device) -> _Table:
    if isinstance(key, Kind):
        return make_table(key, by_slot, device)
    if isinstance(key, tuple):
        return make_sparse_table(by_slot, device)
    return make_factor_table(by_slot, device)
