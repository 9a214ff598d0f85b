"""Experts of their own: rows of a variant go through its experts once more.

An expert is not linear, so its delta cannot be added to what the base's came to. vLLM packs the base's
experts into its kernel's layout, from which no product can be had alone. So the first variant that
changes experts has the base's read again, in plain layout, and each expert then computes
`act(x (W13 + D13)^T) (W2 + D2)^T` for the rows that chose it, with deltas in the forms that the CPU
applies fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from deltafold.runtime.vllm.hooks import Calls, Content
from deltafold.runtime.vllm.rows import Segment, StepRows
from deltafold.runtime.vllm.windows import Piece

#: The gate's and the up projection's rows in one matrix `[2 I, M]`, and the way back `[M, I]`.
GATE_UP, DOWN = "w13_weight", "w2_weight"


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(x, approximate="tanh")


#: What gated activations do to the gate's half.
ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": _gelu_tanh,
}


@dataclass(frozen=True)
class Experts:
    """One variant's experts of a layer.

    Attributes:
        pieces: by attribute and expert, forms for some of its rows.
    """

    pieces: dict[tuple[str, int], list[Piece]]


class ExpertsHook:
    """The deltas of one layer's experts.

    Args:
        name: of the module.
        layer: vLLM's experts.
        rows: of the running step.
        slots: how many there are.
    """

    def __init__(self, name: str, layer: Any, rows: StepRows, slots: int) -> None:
        self.name, self.calls = name, Calls()
        self.base: dict[str, torch.Tensor] = {}
        self._layer, self._rows = layer, rows
        self._slots: list[Experts | None] = [None] * slots

    def put(self, slot: int, content: Content | None) -> None:
        """Fill a slot, or empty it."""
        pieces = {} if content is None else content.experts
        self._slots[slot] = Experts(pieces) if pieces else None

    def rerun(
        self, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> None:
        """Replace the variants' rows of y.

        Args:
            y: `[tokens, M]`, what the base's experts came to.
            x: `[tokens, M]`.
            weights: `[tokens, K]`, of the chosen experts.
            ids: `[tokens, K]`, which they are.
        """
        self.calls.products += 1
        self.calls.rows = x.shape[0]
        for segment in self._rows.tokens:
            experts = self._slots[segment.slot]
            if experts is not None:
                self._segment(y, x, weights, self._local(ids), segment, experts)

    def _segment(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        segment: Segment,
        experts: Experts,
    ) -> None:
        mine, chosen, share = segment.take(x), segment.take(ids), segment.take(weights)
        total = torch.zeros(len(mine), y.shape[1], dtype=torch.float32)
        activation = ACTIVATIONS[self._layer.activation.value]
        for expert in torch.unique(chosen).tolist():
            if expert < 0:
                continue  # another rank's
            row, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = self._product(GATE_UP, expert, mine[row], experts).chunk(2, dim=1)
            out = self._product(DOWN, expert, activation(gate) * up, experts)
            total.index_add_(0, row, out.to(torch.float32) * share[row, place].unsqueeze(1))
        segment.put(y, total.to(y.dtype))

    def _product(
        self, attribute: str, expert: int, x: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        y = nn.functional.linear(x, self.base[attribute][expert])
        for piece in experts.pieces.get((attribute, expert), []):
            y[:, piece.row : piece.row + piece.rows] += piece.form.matmul(x)
        return y

    def _local(self, ids: torch.Tensor) -> torch.Tensor:
        where: torch.Tensor | None = self._layer.expert_map
        return ids if where is None else where[ids.long()]


def why_not(layer: Any, *, fixed: bool) -> str:
    """Why a layer's experts cannot be changed by request; empty where they can."""
    method = layer.quant_method
    if type(method).__name__ != "UnquantizedFusedMoEMethod":
        return f"its experts are in the hands of {type(method).__name__}"
    if fixed:
        return "experts have no form of fixed shape yet, which a GPU needs"
    if method.is_monolithic:
        return "its kernel chooses experts by itself"
    if layer.apply_router_weight_on_input:
        return "it weighs what goes into experts, not what comes out"
    if layer.activation.value not in ACTIVATIONS:
        return f"its activation is {layer.activation.value}"
    return ""
