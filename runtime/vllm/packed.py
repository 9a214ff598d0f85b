"""Slots of packed deltas in GPU memory: fixed addresses, fixed launches, the embedded engine's kernels.

A layer's slot has a place for each layout that variants may come in. Its table of addresses is made
once. Bringing a variant in copies its parts there and sets how many of them count, so a CUDA graph that
was captured with empty slots serves whatever is in them when it is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from deltafold.runtime.kernels.base import leaves
from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.launch import add_slices
from deltafold.runtime.kernels.triton.layout import Kind, Slice
from deltafold.runtime.kernels.triton.lookup import add_rows
from deltafold.runtime.kernels.triton.lowrank import FactorTable, add_factors, make_factor_table
from deltafold.runtime.kernels.triton.parts import MOST_PARTS
from deltafold.runtime.kernels.triton.segments import Segments
from deltafold.runtime.kernels.triton.sparse import (
    BLOCK,
    SparseRows,
    SparseTable,
    add_sparse,
    make_sparse_table,
)
from deltafold.runtime.kernels.triton.table import SliceTable, make_table
from deltafold.runtime.vllm.needs import Key, Place, Span
from deltafold.runtime.vllm.places import list_blocks
from deltafold.runtime.vllm.windows import Piece

_Table: TypeAlias = SliceTable | SparseTable | FactorTable
_Held: TypeAlias = Slice | SparseRows | Factors


@dataclass
class _Launch:
    """One launch: some spans' places of one key.

    Attributes:
        key: what they share.
        spans: the parts, in their order.
        places: of each span.
        held: `[part][slot]`, the pieces whose memory the table points to.
        table: of all.
    """

    key: Key
    spans: list[Span]
    places: list[Place]
    held: list[list[list[_Held]]]
    table: _Table


class PackedSlots:
    """A layer's packed deltas, by slot.

    Args:
        needs: what there must be room for, by span of output rows and key.
        slots: how many slots.
        device: of the model.
        dtype: of the model.
    """

    def __init__(
        self,
        needs: Mapping[Span, Mapping[Key, Place]],
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._launches: list[_Launch] = []
        self._forms: list[list[Piece]] = [[] for _ in range(slots)]
        keys = list(dict.fromkeys(key for places in needs.values() for key in places))
        for key in keys:
            spans = sorted(span for span, places in needs.items() if key in places)
            for start in range(0, len(spans), MOST_PARTS):
                some = spans[start : start + MOST_PARTS]
                places = [needs[span][key] for span in some]
                self._launches.append(_launch(key, some, places, slots, device, dtype))

    @property
    def nbytes(self) -> int:
        """GPU memory held, in bytes, tables of addresses included."""
        tensors = [t for launch in self._launches for t in _tensors(launch)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def put(self, slot: int, pieces: Sequence[Piece]) -> None:
        """Copy a variant's parts into a slot; no pieces empty it. Nothing waits for the device."""
        filled = {(id(launch), part): _Filled() for launch, part in self._parts()}
        self._forms[slot] = []
        for piece in pieces:
            span = (piece.row, piece.rows)
            for form, weight in leaves(piece.form):
                whole = []
                for key, one in _taken_apart(form):
                    launch, part = self._find(key, span)
                    whole.append(filled[id(launch), part].take(launch, part, slot, one, weight))
                self._forms[slot].append(Piece(*span, _as_form(whole)))
        for launch, part in self._parts():
            filled[id(launch), part].write(launch.table, part, slot)

    def forms(self, slot: int) -> list[Piece]:
        """What is in a slot, as forms on the device."""
        return self._forms[slot]

    def add(self, y: torch.Tensor, x: torch.Tensor, segments: Segments) -> None:
        """`y[t] += x[t] D^T` with each token's slot; y `[T, N]`, x `[T, M]`."""
        for launch in self._launches:
            ys = [y[:, row : row + rows] for row, rows in launch.spans]
            if isinstance(launch.table, SliceTable):
                add_slices(ys, x, launch.table, segments)
            elif isinstance(launch.table, SparseTable):
                add_sparse(ys, x, launch.table, segments)
            else:
                add_factors(ys, x, launch.table, segments)

    def add_rows(self, y: torch.Tensor, ids: torch.Tensor, segments: Segments) -> None:
        """`y[t] += D[ids[t]]` with each token's slot; y `[T, M]`, ids `[T]` of this rank's rows."""
        for launch in self._launches:
            assert isinstance(launch.table, SliceTable), "a table has slices alone"
            assert launch.spans[0][0] == 0, "a table begins at its first row"
            add_rows(y, ids, launch.table, segments)

    def _parts(self) -> Iterator[tuple[_Launch, int]]:
        for launch in self._launches:
            for part in range(len(launch.spans)):
                yield launch, part

    def _find(self, key: Key, span: Span) -> tuple[_Launch, int]:
        for launch in self._launches:
            if launch.key == key and span in launch.spans:
                return launch, launch.spans.index(span)
        raise AssertionError(f"no place for {key} at {span}: it was checked when the variant came")


@dataclass
class _Filled:
    """What was copied into one part's slot so far."""

    factors: list[float] = field(default_factory=list)
    rank: int = 0
    b: torch.Tensor | None = None

    def take(self, launch: _Launch, part: int, slot: int, one: _Held, weight: float) -> _Held:
        """Copy a piece to its place; the same piece, as it lies there."""
        held = launch.held[part][slot]
        if isinstance(one, Slice):
            to = held[len(self.factors)]
            assert isinstance(to, Slice)
            _copy(to.words, one.words)
            _copy(to.levels, one.levels)
            if to.columns is not None:
                assert one.columns is not None
                _copy(to.columns, one.columns)
            self.factors.append(one.factor * weight)
            return Slice(one.kind, to.words, to.levels, one.factor, to.columns)
        to = held[0]
        assert not self.factors, "one of its kind a part"
        self.factors.append(weight)
        if isinstance(one, SparseRows):
            assert isinstance(to, SparseRows)
            return _copy_sparse(to, one)
        assert isinstance(one, Factors)
        assert isinstance(to, Factors)
        self.rank = len(one.a)
        a = to.a[: self.rank]
        b = to.b.view(-1)[: one.b.numel()].view(one.b.shape)
        _copy(a, one.a)
        _copy(b, one.b)
        return Factors(a, b)

    def write(self, table: _Table, part: int, slot: int) -> None:
        """Tell the kernels."""
        table.counts[part, slot] = len(self.factors)
        for i, factor in enumerate(self.factors):
            table.factors[part, slot, i] = factor
        if isinstance(table, FactorTable):
            table.ranks[part, slot] = self.rank


def _copy_sparse(to: SparseRows, one: SparseRows) -> SparseRows:
    places = to.places[: len(one.places)]
    values = None if to.values is None else to.values[: len(one.places)]
    _copy(places, one.places)
    _copy(to.starts, one.starts)
    _copy(to.levels, one.levels)
    if values is not None:
        assert one.values is not None
        _copy(values, one.values)
    return SparseRows(places, values, to.starts, to.levels, one.rows, one.columns, one.of, one.half)


def _copy(to: torch.Tensor, value: torch.Tensor) -> None:
    to.copy_(value, non_blocking=True)


def _taken_apart(form: Any) -> list[tuple[Key, _Held]]:
    if isinstance(form, BitSlices):
        return [(piece.kind.of_blocks, piece) for piece in form.slices]
    if isinstance(form, SparseRows):
        return [(form.layout, form)]
    assert isinstance(form, Factors), type(form)
    return [(None, form)]


def _as_form(pieces: list[_Held]) -> Any:
    if isinstance(pieces[0], Slice):
        return BitSlices(tuple(p for p in pieces if isinstance(p, Slice)))
    return pieces[0]


def _launch(
    key: Key,
    spans: list[Span],
    places: list[Place],
    slots: int,
    device: torch.device,
    dtype: torch.dtype,
) -> _Launch:
    held: list[list[list[Any]]] = [
        [_rooms(key, span, place, device, dtype) for _ in range(slots)]
        for span, place in zip(spans, places, strict=True)
    ]
    by_part = [[[(one, 1.0) for one in pieces] for pieces in part] for part in held]
    table: _Table
    if isinstance(key, Kind):
        table = make_table(key, by_part, device)
    elif key is not None:
        table = make_sparse_table(by_part, device)
    else:
        table = make_factor_table(by_part, device)
        table.ranks.zero_()
    table.counts.zero_()
    return _Launch(key, spans, places, held, table)


def _rooms(
    key: Key, span: Span, place: Place, device: torch.device, dtype: torch.dtype
) -> list[_Held]:
    """Empty pieces of a slot, as large as a place allows."""
    rows = span[1]
    if isinstance(key, Kind):
        assert place.kind is not None
        return [_slice_room(place.kind, device) for _ in range(place.entries)]
    if key is None:
        a = torch.zeros(place.room, place.columns, dtype=dtype, device=device)
        return [Factors(a, torch.zeros(rows, place.room, dtype=dtype, device=device))]
    of, half = key
    blocks = list_blocks(rows)
    kind = torch.uint8 if of else torch.int16
    values = None if of else torch.zeros(place.room, BLOCK, dtype=torch.float16, device=device)
    return [
        SparseRows(
            places=torch.zeros(place.room, BLOCK, dtype=kind, device=device),
            values=values,
            starts=torch.zeros(blocks + 1, dtype=torch.int32, device=device),
            levels=torch.zeros(blocks * BLOCK, device=device),
            rows=rows,
            columns=place.columns,
            of=of,
            half=half,
        )
    ]


def _slice_room(kind: Kind, device: torch.device) -> Slice:
    shape = (kind.row_blocks, kind.column_tiles, kind.block_rows, kind.block_words)
    levels = (kind.groups, kind.row_blocks * kind.block_rows)
    columns = torch.zeros(kind.columns, device=device) if kind.by_column else None
    return Slice(
        kind,
        torch.zeros(shape, dtype=torch.int16, device=device),
        torch.zeros(levels, dtype=kind.level_dtype, device=device),
        1.0,
        columns,
    )


def _tensors(launch: _Launch) -> list[torch.Tensor]:
    """Every tensor of a launch once."""
    found: list[Any] = [v for v in vars(launch.table).values() if isinstance(v, torch.Tensor)]
    for one in (one for part in launch.held for slot in part for one in slot):
        found += [v for v in vars(one).values() if isinstance(v, torch.Tensor)]
    return found
