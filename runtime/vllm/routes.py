"""Where a checkpoint's tensors land in vLLM's parameters, found by watching its own loader.

vLLM merges, slices and renames tensors on the way in, by architecture and by tensor-parallel rank. A
throw-away instance of the model without storage (the meta device) loads a checkpoint without storage,
and every copy between the two is noted: which part of which tensor went to which part of which
parameter. No list of architectures is needed. What a loader computes instead of copying is not seen,
and a variant that changes such a tensor is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltafold.compress import Checkpoint, dtypes


@dataclass(frozen=True)
class Region:
    """A strided part of a contiguous tensor: elements, not bytes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of a contiguous tensor."""
        return whole.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Window:
    """Rows and columns `[row, row + rows) x [column, column + columns)` of a matrix."""

    row: int
    rows: int
    column: int
    columns: int

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """This part of a matrix, a view."""
        rows = matrix[self.row : self.row + self.rows]
        return rows[:, self.column : self.column + self.columns]


@dataclass(frozen=True)
class Move:
    """One copy that the loader made.

    Attributes:
        parameter: name of the parameter in vLLM's model.
        source: the part of the checkpoint's tensor.
        target: the part of the parameter.
        shape: of the whole parameter.
    """

    parameter: str
    source: Region
    target: Region
    shape: tuple[int, ...]

    def as_rows(self, shape: tuple[int, ...]) -> tuple[Window, int] | None:
        """The window of a checkpoint's matrix and the parameter's first row, where the copy put a
        window on whole rows as it is; else None.
        """
        if len(shape) != 2 or len(self.shape) != 2 or len(self.source.size) != 2:
            return None
        (rows, columns), (_, wide), (_, width) = self.source.size, shape, self.shape
        row, column = divmod(self.source.offset, max(wide, 1))
        plain = _strides_fit(self.source, wide) and _strides_fit(self.target, width)
        if not plain or columns != width or self.target.offset % max(width, 1):
            return None
        if column + columns > wide:
            return None
        return Window(row, rows, column, columns), self.target.offset // max(width, 1)

    def as_expert_rows(self, shape: tuple[int, ...]) -> tuple[int, Window, int] | None:
        """As `as_rows` for a parameter `[experts, N, M]`: the expert, the window, the first row."""
        if len(self.shape) != 3:
            return None
        size = self.shape[1] * self.shape[2]
        expert, offset = divmod(self.target.offset, max(size, 1))
        target = Region(self.target.size, self.target.stride, offset)
        rows = Move(self.parameter, self.source, target, self.shape[1:]).as_rows(shape)
        return None if rows is None else (expert, *rows)


def _strides_fit(region: Region, width: int) -> bool:
    rows, columns = region.size
    return (columns == 1 or region.stride[1] == 1) and (rows == 1 or region.stride[0] == width)


@dataclass
class Routes:
    """What the loader does with each tensor of the base's checkpoint, on this rank.

    Attributes:
        moves: the copies of each tensor that arrived here.
        owners: every module and attribute that holds a parameter, by the parameter's name.
        elsewhere: tensors that other pipeline ranks hold.
    """

    moves: dict[str, list[Move]] = field(default_factory=dict)
    owners: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every `copy_` from a known tensor into a known parameter."""

    def __init__(self, parameters: dict[int, tuple[str, torch.Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = parameters
        self.sources: dict[int, str] = {}
        self.moves: dict[str, list[Move]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._note(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, target: torch.Tensor, source: torch.Tensor) -> None:
        tensor = self.sources.get(_storage(source))
        parameter = self.parameters.get(_storage(target))
        if tensor is None or parameter is None:
            return
        name, whole = parameter
        source = source.expand(target.shape) if source.shape != target.shape else source
        move = Move(name, _region(source), _region(target), tuple(whole.shape))
        self.moves.setdefault(tensor, []).append(move)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _region(tensor: torch.Tensor) -> Region:
    return Region(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))


def find_routes(vllm_config: Any, base: Checkpoint) -> Routes:
    """Watch a throw-away instance load the base's tensors, all without storage."""
    return routes_of(empty_model(vllm_config), base)


def routes_of(model: Any, base: Checkpoint) -> Routes:
    """What an instance without storage does with a base's tensors."""
    owners: dict[int, list[tuple[str, str]]] = {}
    parameters: dict[int, tuple[str, torch.Tensor]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, value in _own_tensors(module):
            key = _storage(value)
            name = f"{module_name}.{attribute}" if module_name else attribute
            parameters.setdefault(key, (name, value))
            owners.setdefault(key, []).append((module_name, attribute))
    recorder = _Recorder(parameters)
    with torch.no_grad(), recorder:
        model.load_weights(_weights(base, recorder))
    routes = Routes(recorder.moves)
    routes.owners = {name: owners[key] for key, (name, _) in parameters.items()}
    routes.elsewhere = _routed_elsewhere(frozenset(routes.moves))
    return routes


def _routed_elsewhere(mine: frozenset[str]) -> frozenset[str]:
    """Tensors that other ranks of the pipeline hold."""
    from vllm.distributed import get_pp_group

    group = get_pp_group()
    if group.world_size == 1:
        return frozenset()
    found: list[frozenset[str]] = [frozenset()] * group.world_size
    torch.distributed.all_gather_object(found, mine, group=group.cpu_group)
    return frozenset().union(*found) - mine


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for own in (module._parameters, module._buffers):
        yield from ((name, value) for name, value in own.items() if value is not None)


def _weights(base: Checkpoint, recorder: _Recorder) -> Iterable[tuple[str, torch.Tensor]]:
    kept = []  # a storage's address must not be used again while the loader runs
    for name in base.names():
        spec = base.spec(name)
        tensor = torch.empty(spec.shape, dtype=dtypes.TORCH[spec.dtype], device="meta")
        kept.append(tensor)
        recorder.sources[_storage(tensor)] = name
        yield name, tensor


def empty_model(vllm_config: Any) -> Any:
    """A second instance of the served model that holds no memory and leaves no trace in `vllm_config`,
    where attention layers register by name.
    """
    from vllm.config import CompilationMode
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = copy.copy(vllm_config)
    # Of a quantised base too the routes are those of plain weights: its deltas are not quantised.
    config.quant_config = None
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.mode = CompilationMode.NONE
    with (
        set_default_torch_dtype(vllm_config.model_config.dtype),
        torch.device("meta"),
        _own_rotations(),
    ):
        return initialize_model(vllm_config=config)


@contextmanager
def _own_rotations() -> Iterator[None]:
    """Rotary embeddings are shared by all models of a process: ours have no storage."""
    from vllm.model_executor.layers import rotary_embedding

    shared: dict[Any, Any] = getattr(rotary_embedding, "_ROPE_DICT", {})
    kept = dict(shared)
    try:
        yield
    finally:
        shared.clear()
        shared.update(kept)
