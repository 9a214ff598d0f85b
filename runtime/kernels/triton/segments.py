"""Which tokens belong to which variant, as tensors of fixed shapes made on the device.

Nothing here waits for the device, so a batch's arithmetic can be captured into a CUDA graph and
replayed for other assignments of the same size. Tokens of the base sort first and belong to no tile:
no kernel visits them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Numbers of tokens that one tile may hold.
TILE_TOKENS = (8, 16, 32, 64)
#: Tokens of a tile where base and delta are added up for it.
MERGED_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Segments:
    """Tokens sorted by slot, cut into tiles of one slot each.

    Attributes:
        order: int32 `[T]`, tokens sorted by slot, those of the base first.
        begin: int32 `[1]`, how many those of the base are.
        slot: int32 `[tiles]`.
        start: int32 `[tiles]`, places in `order`.
        length: int32 `[tiles]`, 0 for tiles that are not needed.
        block: most tokens of a tile.
        scales: float32 `[T]`, factors of each token's delta by token, or None.
    """

    order: torch.Tensor
    begin: torch.Tensor
    slot: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    block: int
    scales: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return self.order.shape[0]

    @property
    def tiles(self) -> int:
        """Tiles, needed or not."""
        return self.slot.shape[0]


def make_segments(
    slots: torch.Tensor,
    capacity: int,
    block: int,
    scales: torch.Tensor | None = None,
    tiles: int | None = None,
) -> Segments:
    """Sort tokens by slot and cut them into tiles.

    Args:
        slots: integers `[T]`, -1 for tokens of the base, else below `capacity`.
        capacity: how many slots there are.
        block: one of `TILE_TOKENS`, or `MERGED_TOKENS`.
        scales: float32 `[T]`, or None.
        tiles: how many tiles to make, where the caller knows how many there are at most; None for as
            many as any assignment can need.
    """
    assert block in (*TILE_TOKENS, MERGED_TOKENS), block
    device, tokens = slots.device, slots.shape[0]
    shifted = slots.to(torch.int64) + 1
    order = torch.argsort(shifted, stable=True)
    counts = torch.zeros(capacity + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, shifted, torch.ones_like(shifted))
    starts = counts.cumsum(0) - counts
    # Slot v has ceil(counts / block) tiles; every tile finds its slot by the running sum of them.
    needed = torch.div(counts[1:] + (block - 1), block, rounding_mode="floor")
    ends = needed.cumsum(0)
    # Tiles hold at least one token, and each slot wastes less than one tile.
    most = min(tokens, capacity + tokens // block) if tiles is None else tiles
    tile = torch.arange(most, device=device)
    slot = torch.searchsorted(ends, tile, right=True)
    used = slot < capacity
    slot = slot.clamp_max(capacity - 1)
    within = (tile - (ends - needed)[slot]) * block
    length = (counts[1:][slot] - within).clamp(0, block)
    return Segments(
        order=order.to(torch.int32),
        begin=counts[:1].to(torch.int32),
        slot=slot.to(torch.int32),
        start=(starts[1:][slot] + within).to(torch.int32),
        length=torch.where(used, length, torch.zeros_like(length)).to(torch.int32),
        block=block,
        scales=scales,
    )


def block_for(longest: int) -> int:
    """Tokens of a tile where a variant has up to `longest`."""
    return next((b for b in TILE_TOKENS if longest <= b), TILE_TOKENS[-1])


def one_segment(tokens: int, device: torch.device) -> Segments:
    """All tokens in slot 0."""
    block = block_for(tokens)
    slots = torch.zeros(tokens, dtype=torch.int64, device=device)
    return make_segments(slots, 1, block, tiles=-(-tokens // block))
