"""The step's rows as the GPU kernels want them: sorted by slot, in tiles, at addresses that stay.

All layers of a step share one sorting. It runs on the device with the first operator of the step that
asks, into tensors that are kept for each number of rows. In a captured graph that first operator's
sorting is part of the graph, and reads the slots that each replay finds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from deltafold.runtime.kernels.triton.segments import Segments, block_for, make_segments
from deltafold.runtime.vllm.hooks import is_capturing


@dataclass
class Tiles:
    """Sortings by number of rows.

    Attributes:
        slots: how many slots there are.
    """

    slots: int
    _kept: dict[int, Segments] = field(default_factory=dict)
    _state: tuple[int, int, bool] | None = None

    def of(self, token_slots: torch.Tensor, step: int) -> Segments:
        """The sorting of a step's tokens.

        Args:
            token_slots: int64 `[T]`, a part of a tensor at an address that stays; -1 for the base.
            step: a number that is another one each time the slots are.
        """
        tokens = len(token_slots)
        state = (step, tokens, is_capturing(token_slots))
        if tokens not in self._kept:
            self._kept[tokens] = self.fresh(token_slots)
        elif state != self._state:
            fresh = self.fresh(token_slots)
            for name in ("order", "begin", "slot", "start", "length"):
                getattr(self._kept[tokens], name).copy_(getattr(fresh, name))
        self._state = state
        return self._kept[tokens]

    def fresh(self, slots: torch.Tensor) -> Segments:
        """A sorting of its own, for rows that no other layer has."""
        # Nobody knows how many rows a variant has without asking the device: as many as another.
        block = block_for(max(len(slots) // self.slots, 1))
        return make_segments(slots, self.slots, block)
