"""Adding deltas inside vLLM's own layers: `quant_method` of linears and tables, `forward` of norms.

No module is replaced, so vLLM's own code keeps slicing, reducing and masking. Every hook ends in a
custom operator, which a compiled or captured model treats as one opaque step. Which hook is meant is
the value of a small CPU tensor that the layer owns: a name in the graph would make every layer's graph
a different one.

A hook works on slots. In the `forms` layout a slot holds whatever form the CPU applies fastest, and
the step's rows are visited as segments. In the `packed` and `dense` layouts slots are memory that is
allocated once, and all shapes are fixed, so that a CUDA graph captured with one variant serves any
other. What has no packed form is dense in the packed layout too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from deltafold.runtime.vllm.rows import Segment, StepRows
from deltafold.runtime.vllm.windows import Piece, TablePiece

if TYPE_CHECKING:
    from deltafold.runtime.kernels.triton.segments import Segments
    from deltafold.runtime.vllm.packed import PackedSlots
    from deltafold.runtime.vllm.tiles import Tiles

#: Rows of one variant above which a step rebuilds its delta: more than graphs are captured for.
LONG: Final = 512


@dataclass
class Content:
    """What one variant adds at one hook.

    Attributes:
        pieces: forms for products (in the packed layout for lookups too), by output rows.
        tables: forms for lookups.
        vectors: differences of one-dimensional parameters, float32, by attribute.
        dense: the whole difference of the weight in the model's dtype, in the dense layout.
        experts: forms for experts, by attribute and expert.
    """

    pieces: list[Piece] = field(default_factory=list)
    tables: list[TablePiece] = field(default_factory=list)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    dense: torch.Tensor | None = None
    experts: dict[tuple[str, int], list[Piece]] = field(default_factory=dict)


@dataclass
class Calls:
    """How often a hook's operator ran, and with how many rows last time.

    Attributes:
        products: calls as a product.
        lookups: calls as a table.
        norms: calls as a norm.
        rows: of the last call.
    """

    products: int = 0
    lookups: int = 0
    norms: int = 0
    rows: int = -1

    @property
    def total(self) -> int:
        """Calls of any kind."""
        return self.products + self.lookups + self.norms


class LayerHook:
    """The deltas of one linear layer, embedding or head.

    Args:
        name: of the module.
        rows: of the running step.
        slots: how many there are.
        is_head: whether its rows are rows of logits when it multiplies.
    """

    def __init__(self, name: str, rows: StepRows, slots: int, *, is_head: bool) -> None:
        self.name, self.is_head, self.calls = name, is_head, Calls()
        self._rows = rows
        self._slots: list[Content | None] = [None] * slots
        self._fixed = False
        self._packed: PackedSlots | None = None
        self._tiles: Tiles | None = None
        self._dense: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None

    def allocate(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        biased: bool,
        dense: bool,
        packed: PackedSlots | None,
        tiles: Tiles | None,
    ) -> None:
        """Take the memory of a fixed layout.

        Args:
            shape: of the weight.
            dtype: of the model.
            device: of the model.
            biased: whether a bias may change.
            dense: whether a copy of the weight a slot is needed.
            packed: the packed deltas' places, or None.
            tiles: what sorts rows for them.
        """
        slots = len(self._slots)
        self._fixed, self._packed, self._tiles = True, packed, tiles
        if dense:
            self._dense = torch.zeros(slots, *shape, dtype=dtype, device=device)
        if biased:
            self._bias = torch.zeros(slots, shape[0], dtype=dtype, device=device)

    @property
    def has_copies(self) -> bool:
        """Whether its slots hold copies of the weight."""
        return self._dense is not None

    @property
    def nbytes(self) -> int:
        """Memory of its slots, in bytes."""
        held = [t for t in (self._dense, self._bias) if t is not None]
        packed = 0 if self._packed is None else self._packed.nbytes
        return packed + sum(t.numel() * t.element_size() for t in held)

    def put(self, slot: int, content: Content | None) -> None:
        """Fill a slot, or empty it."""
        self._slots[slot] = content
        if self._packed is not None:
            self._packed.put(slot, [] if content is None else content.pieces)
        if self._dense is not None:
            _copy(self._dense[slot], None if content is None else content.dense)
        if self._bias is not None:
            _copy(self._bias[slot], None if content is None else content.vectors.get("bias"))

    def rests(self, x: torch.Tensor) -> bool:
        """Whether no row of a product's input runs a variant; counts the call if so."""
        idle = self._rows.rests_at_head if self.is_head else self._rows.rests
        if idle:
            self.calls.products += 1
            self.calls.rows = x.shape[0]
        return idle

    def rests_at_lookup(self, ids: torch.Tensor) -> bool:
        """The same for ids that are looked up."""
        idle = self._rows.rests
        if idle:
            self.calls.lookups += 1
            self.calls.rows = ids.shape[0]
        return idle

    def add_products(self, y: torch.Tensor, x: torch.Tensor, biased: bool) -> None:
        """`y[rows] += x[rows] D^T (+ b)`; y `[tokens, N]`, x `[tokens, M]`."""
        if self.rests(x):
            return
        self.calls.products += 1
        self.calls.rows = x.shape[0]
        if self._fixed:
            self._add_fixed(y, x, biased)
            return
        for segment in self._rows.head_segments(x) if self.is_head else self._rows.tokens:
            content = self._slots[segment.slot]
            if content is not None:
                self._add_segment(y, x, segment, content, biased)

    def _add_segment(
        self, y: torch.Tensor, x: torch.Tensor, segment: Segment, content: Content, biased: bool
    ) -> None:
        bias = content.vectors.get("bias") if biased else None
        if not content.pieces and bias is None:
            return
        mine = segment.take(x)
        if len(content.pieces) == 1 and content.pieces[0].rows == y.shape[1]:
            total = content.pieces[0].form.matmul(mine)
        else:
            total = y.new_zeros(len(mine), y.shape[1])
            for piece in content.pieces:
                total[:, piece.row : piece.row + piece.rows] += piece.form.matmul(mine)
        segment.add(y, (total if bias is None else total + bias).to(y.dtype))

    def _add_fixed(self, y: torch.Tensor, x: torch.Tensor, biased: bool) -> None:
        """All slots, whatever is in them: the same work for the same number of rows."""
        rows = self._rows
        slots = (rows.head_slots(x) if self.is_head else rows.token_slots)[: x.shape[0]]
        if self._packed is not None and self._is_long(x):
            self._add_long(y, x, self._packed)
        elif self._packed is not None:
            self._packed.add(y, x, self._segments(slots))
        for slot in [] if self._dense is None else range(len(self._slots)):
            assert self._dense is not None
            mine = torch.where((slots == slot).unsqueeze(1), x, 0)
            y.add_(nn.functional.linear(mine, self._dense[slot]))
        if biased and self._bias is not None:
            y.add_(_of_slots(self._bias, slots))

    def _segments(self, slots: torch.Tensor) -> Segments:
        assert self._tiles is not None
        if self.is_head:
            return self._tiles.fresh(slots)
        return self._tiles.of(slots, self._rows.step)

    def _is_long(self, x: torch.Tensor) -> bool:
        """Whether a variant has so many rows that its delta is better rebuilt. Graphs are not captured
        for such steps: they depend on what the host knows.
        """
        return not self.is_head and self._rows.longest > LONG and not is_capturing(x)

    def _add_long(self, y: torch.Tensor, x: torch.Tensor, packed: PackedSlots) -> None:
        for segment in self._rows.tokens:
            pieces = packed.forms(segment.slot)
            if pieces:
                mine = segment.take(x)
                total = y.new_zeros(len(mine), y.shape[1])
                for piece in pieces:
                    total[:, piece.row : piece.row + piece.rows] += piece.form.matmul(mine)
                segment.add(y, total)

    def add_rows(self, y: torch.Tensor, ids: torch.Tensor) -> None:
        """`y[rows] += D[ids[rows]]`; ids `[tokens]`, local to this rank."""
        if self.rests_at_lookup(ids):
            return
        self.calls.lookups += 1
        self.calls.rows = ids.shape[0]
        slots = self._rows.token_slots[: len(ids)]
        if self._packed is not None:
            assert self._tiles is not None
            segments = self._tiles.of(slots, self._rows.step)
            self._packed.add_rows(y, ids.contiguous(), segments)
        if self._dense is not None:
            known = self._dense[slots.clamp_min(0), ids]
            y.add_(torch.where((slots >= 0).unsqueeze(1), known, 0))
        for segment in [] if self._fixed else self._rows.tokens:
            content = self._slots[segment.slot]
            for table in [] if content is None else content.tables:
                segment.add(y, table.gather(segment.take(ids)).to(y.dtype))


class NormHook:
    """The deltas of one norm: its rows are normed again with the variant's own parameters.

    Args:
        name: of the module.
        module: the norm.
        rows: of the running step.
        slots: how many there are.
        neutral: the weight that changes nothing (0 for a norm that multiplies by 1 + weight).
    """

    def __init__(
        self, name: str, module: nn.Module, rows: StepRows, slots: int, neutral: float
    ) -> None:
        self.name, self.calls = name, Calls()
        self._module, self._rows, self._neutral = module, rows, neutral
        self._slots: list[dict[str, torch.Tensor] | None] = [None] * slots
        self._dense: dict[str, torch.Tensor] = {}
        self._plain = _plain_forward(module)

    def allocate(self) -> None:
        """Take the memory of a fixed layout."""
        for name, value in self._values().items():
            self._dense[name] = value.repeat(len(self._slots), *[1] * value.dim())

    @property
    def nbytes(self) -> int:
        """Memory of its slots, in bytes."""
        return sum(t.numel() * t.element_size() for t in self._dense.values())

    def put(self, slot: int, content: Content | None) -> None:
        """Fill a slot, or empty it."""
        moved = None
        if content is not None and content.vectors:
            moved = {name: self._moved(name, v) for name, v in self._values().items()}
            for name, delta in content.vectors.items():
                moved[name] = self._moved(name, self._values()[name], delta)
        self._slots[slot] = moved
        for name, held in self._dense.items():
            held[slot].copy_((moved or self._values())[name])

    def rests(self, x: torch.Tensor) -> bool:
        """Whether no row runs a variant; counts the call if so."""
        idle = self._rows.rests
        if idle:
            self.calls.norms += 1
            self.calls.rows = x.shape[0]
        return idle

    def renorm(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Replace the variants' rows of y; x `[tokens, ...]` is what was normed."""
        if self.rests(x):
            return
        self.calls.norms += 1
        self.calls.rows = x.shape[0]
        if self._dense:
            self._renorm_dense(y, x)
            return
        for segment in self._rows.tokens:
            moved = self._slots[segment.slot]
            if moved is not None:
                segment.put(y, self._normed(segment.take(x), moved))

    def _renorm_dense(self, y: torch.Tensor, x: torch.Tensor) -> None:
        slots = self._rows.token_slots[: x.shape[0]]
        neutral = {n: torch.full_like(v, self._neutral) for n, v in self._values().items()}
        if "bias" in neutral:
            neutral["bias"].zero_()
        normed = self._normed(x, neutral)
        shape = (len(slots), *[1] * (x.dim() - 2), -1)
        own = {n: held[slots.clamp_min(0)].view(shape) for n, held in self._dense.items()}
        normed = normed * (own["weight"] + (1 - self._neutral)).to(normed.dtype)
        if "bias" in own:
            normed = normed + own["bias"].to(normed.dtype)
        mask = (slots >= 0).view(shape)
        y.copy_(torch.where(mask, normed, y))

    def _values(self) -> dict[str, torch.Tensor]:
        own = self._module._parameters
        return {name: value.detach() for name, value in own.items() if value is not None}

    def _moved(
        self, name: str, base: torch.Tensor, delta: torch.Tensor | None = None
    ) -> torch.Tensor:
        if delta is None:
            return base
        return (base.to(torch.float32) + delta.to(base.device)).to(base.dtype)

    def _normed(self, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """The module's own arithmetic with other parameters; runs inside an operator, never traced."""
        own = self._module._parameters
        kept = dict(own)
        own.update({n: nn.Parameter(v, requires_grad=False) for n, v in values.items()})
        try:
            return self._plain(x)
        finally:
            own.update(kept)


def _plain_forward(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    native: Callable[[torch.Tensor], torch.Tensor] | None
    native = getattr(module, "forward_native", None)
    if native is None:
        native = partial(type(module).forward, module)
    return native


def is_capturing(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _copy(held: torch.Tensor, value: torch.Tensor | None) -> None:
    if value is None:
        held.zero_()
    else:
        held.copy_(value, non_blocking=True)


def _of_slots(held: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return torch.where((slots >= 0).unsqueeze(1), held[slots.clamp_min(0)], 0)


#: Every hook of this process; operators find theirs by its number.
HOOKS: Final[list[Any]] = []


def register(hook: Any) -> torch.Tensor:
    """Number a hook; the number is what its layer hands to the operators."""
    HOOKS.append(hook)
    return torch.tensor(len(HOOKS) - 1, dtype=torch.int64, device="cpu")
