"""What a CUDA graph needs: a running batch's arithmetic never asks the device for a value.

Tensors here lie on torch's meta device, which has shapes and no values: whatever needs a value on the
host (`.item()`, `nonzero`, a mask as an index, `.cpu()`) fails, and so does every tensor of the host,
since copying one would wait for the device or copy freed memory when a graph is replayed. Kernels are
not run but noted. On a GPU `test_triton.py` captures and replays real graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels.base import DeltaMatrix, Scaled, Sum
from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.layers import EmbeddingHook, LinearHook
from deltafold.runtime.loading import LoadedVariant

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from slices import random_kind

from deltafold.runtime.kernels.triton import dense, launch, lookup, lowrank, sparse
from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.grouped import GroupedProducts
from deltafold.runtime.kernels.triton.layout import Kind, Slice
from deltafold.runtime.kernels.triton.segments import make_segments
from deltafold.runtime.kernels.triton.sparse import SparseRows

META = torch.device("meta")
ROWS, COLUMNS = 140, 600


class DeviceOnly(TorchDispatchMode):
    """Refuses every operation that takes or makes a tensor of the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor):
                assert value.device.type == "meta", f"{func} uses a tensor of the host"
        return out


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Names and grids of the kernels that would run."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(type(size) is int for size in grid), grid
            seen.append((self.name, grid))
            return self.run

        def run(self, *args: Any, **constants: Any) -> None:
            for value in args:
                assert isinstance(value, int) or value.device == META, (self.name, value)
            assert all(not isinstance(value, torch.Tensor) for value in constants.values())

    for module, names in (
        (launch, ["apply_slices", "add_splits"]),
        (sparse, ["apply_sparse"]),
        (lowrank, ["shrink", "stretch"]),
        (dense, ["multiply"]),
        (lookup, ["look_up"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Noted(name))
    monkeypatch.setattr(launch, "splits_for", lambda *_: 2)
    return seen


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def slices(*bits: int, group: int = 0) -> BitSlices:
    return BitSlices(tuple(slice_of(random_kind(b, ROWS, COLUMNS, group)) for b in bits))


def slice_of(kind: Kind) -> Slice:
    shape = (kind.row_blocks, kind.column_tiles, kind.block_rows, kind.block_words)
    levels = empty(kind.groups, kind.row_blocks * kind.block_rows, dtype=torch.float32)
    return Slice(kind, empty(*shape, dtype=torch.int16), levels, 1.0)


def forms() -> dict[str, DeltaMatrix]:
    blocks = -(-ROWS // sparse.BLOCK)
    lists = SparseRows(
        places=empty(9, sparse.BLOCK, dtype=torch.int16),
        values=empty(9, sparse.BLOCK, dtype=torch.float16),
        starts=empty(blocks + 1, dtype=torch.int32),
        levels=empty(blocks * sparse.BLOCK, dtype=torch.float32),
        rows=ROWS,
        columns=COLUMNS,
    )
    return {
        "1 bit": slices(1),
        "3 bits in groups": slices(2, 1, group=64),
        "lists": lists,
        "low rank": Factors(empty(5, COLUMNS), empty(ROWS, 5)),
        "dense": Dense(empty(ROWS, COLUMNS)),
        "a mixture": Sum(
            [Scaled(slices(4), 0.5), Scaled(Factors(empty(3, COLUMNS), empty(ROWS, 3)), 2)]
        ),
    }


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: int(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.repeat_interleave(x),
        lambda x: torch.tensor([1, 2]).to(x.device),
        lambda x: x[torch.tensor([1])],
        lambda x: torch.unique(x),
    ],
)
def test_the_guard_sees_who_asks(ask: Callable[[torch.Tensor], object]) -> None:
    x = empty(4, dtype=torch.int64)
    with DeviceOnly(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        ask(x)


def test_segments_and_launches_depend_on_sizes_alone(launches: list[Any]) -> None:
    every = list(forms().values())
    layer, capacity = GroupedProducts(2), len(every)
    by_slot = {slot: (form, form) for slot, form in enumerate(every)}
    ys, x = [empty(11, ROWS), empty(11, ROWS)], empty(11, COLUMNS)
    slots, scales = empty(11, dtype=torch.int64), empty(11, dtype=torch.float32)
    # Addresses go to the device when variants come and go, before a graph is captured or replayed.
    layer.add(ys, x, by_slot, make_segments(slots, capacity, 8, scales), capacity)
    first = launches.copy()
    launches.clear()
    with DeviceOnly():
        layer.add(ys, x, by_slot, make_segments(slots, capacity, 8, scales), capacity)
    assert launches == first
    names = {name for name, _ in launches}
    kernels = {"apply_slices", "add_splits", "apply_sparse", "shrink", "stretch", "multiply"}
    assert names == kernels


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_hooks_of_layers_and_tables_ask_for_nothing(launches: list[Any], scale: float) -> None:
    linear = nn.Linear(COLUMNS, ROWS, device=META, dtype=torch.bfloat16).requires_grad_(False)
    table = nn.Embedding(ROWS, COLUMNS, device=META, dtype=torch.bfloat16).requires_grad_(False)
    state = BatchState(META)
    state.packed = True
    rows: list[tuple[LoadedVariant | None, float]] = [(None, 1.0)]
    for name, form in forms().items():
        variant = LoadedVariant(name, Path())
        variant.products["linear"] = form
        variant.vectors["linear"] = {"bias": empty(ROWS, dtype=torch.float32)}
        if isinstance(form, BitSlices):
            variant.tables["table"] = form
        rows.append((variant, scale))
    multiply, look = LinearHook("linear", linear, state), EmbeddingHook("table", table, state)
    x, ids = empty(len(rows), 3, COLUMNS), empty(len(rows), 3, dtype=torch.int64)
    with state.running(rows):
        multiply(x)
        look(ids)
        state._segments.clear()
        launches.clear()
        with DeviceOnly():
            assert multiply(x).shape == (len(rows), 3, ROWS)
            assert look(ids).shape == (len(rows), 3, COLUMNS)
    assert {"apply_slices", "look_up"} <= {name for name, _ in launches}
