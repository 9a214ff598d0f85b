"""Launches of the kernels in `apply.py`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from deltafold.runtime.kernels.triton.apply import add_splits, apply_slices
from deltafold.runtime.kernels.triton.parts import outputs
from deltafold.runtime.kernels.triton.segments import Segments
from deltafold.runtime.kernels.triton.table import SliceTable
from deltafold.runtime.kernels.triton.unpack import INTERPRETED

#: Blocks for each multiprocessor that hide the waiting for memory.
_BLOCKS_EACH = 2
_ROWS_ADDED = 1024
_HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def on(device: torch.device) -> AbstractContextManager[object]:
    """Where kernels are launched; Triton asks torch for the current device, not the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def add_slices(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    table: SliceTable,
    segments: Segments,
    splits: int = 0,
) -> None:
    """`y_p[t] += s[t] * sum_i factor_i x[t] D_pi^T` over the slices of part p and token t's slot.

    Args:
        ys: an output `[T, N_p]` for each part: float32, bfloat16 or float16, changed in place. Tokens
            of the base are not touched.
        x: `[T, M]` of the same dtype.
        table: the slices by part and slot.
        segments: which slot each token has.
        splits: parts that the columns are cut into, summed afterwards; 0 lets the shape decide.
    """
    kind = table.kind
    assert x.shape == (segments.tokens, kind.columns), (x.shape, kind)
    assert all(y.shape[1] >= width for y, width in zip(ys, table.widths, strict=True))
    assert x.stride(1) == 1, "rows must be contiguous"
    if not segments.tiles or not table.blocks:
        return
    blocks, bn = table.blocks, kind.block_rows
    splits = splits or splits_for(blocks * segments.tiles, kind.column_tiles, x.device)
    splits = max(1, min(splits, kind.column_tiles))
    direct = splits == 1
    held, strides = outputs(ys)
    partial = held[0]
    if not direct:
        shape = (splits, segments.tokens, blocks * bn)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    scaled = segments.scales is not None
    first, widths = table.places.unbind(0)
    with on(x.device):
        apply_slices[(blocks * splits, segments.tiles)](
            x, *held, partial, segments.order, segments.slot, segments.start, segments.length,
            segments.scales if scaled else segments.order,
            table.words, table.levels, table.factors, table.columns, table.counts, table.rows,
            first, widths, table.slots, kind.columns, x.stride(0), *strides,
            0 if direct else partial.stride(1), 0 if direct else partial.stride(0), kind.group,
            **constants(table, segments.block, x.dtype, splits, scaled),
            **options(bn, segments.block, x.dtype),
        )  # fmt: skip
        if not direct:
            most = max(table.widths)
            block = min(_ROWS_ADDED, triton.next_power_of_2(most))
            add_splits[(triton.cdiv(most, block), segments.tokens, table.parts)](
                partial, *held, segments.order, segments.begin, first, widths,
                *strides, partial.stride(1), partial.stride(0),
                SPLITS=splits, BN=block, BLOCK_ROWS=bn, PARTS=table.parts,
            )  # fmt: skip


def constants(
    table: SliceTable, block: int, dtype: torch.dtype, splits: int, scaled: bool
) -> dict[str, Any]:
    """The compile-time arguments of `apply_slices`."""
    kind = table.kind
    each = triton.cdiv(kind.column_tiles, splits)
    return {
        "BITS": kind.bits,
        "FIELDS": kind.fields,
        "USED": kind.used_fields,
        "FOLD": kind.fold,
        "BN": kind.block_rows,
        "BW": kind.block_words,
        "BT": block,
        "ENTRIES": table.entries,
        "TILES": kind.column_tiles,
        "SPLITS": splits,
        "TILES_EACH": each,
        "EVEN": kind.columns == splits * each * kind.tile_columns,
        "BY_COLUMN": kind.by_column,
        "HALF_LEVELS": kind.level_dtype == torch.float16,
        "SCALED": scaled,
        "DIRECT": splits == 1,
        "COMPUTE": compute_type(dtype),
        "PAIRS": in_pairs(dtype),
        "STAGES": 3 if block <= 16 else 2,
        "PARTS": table.parts,
    }


def in_pairs(dtype: torch.dtype) -> bool:
    """Whether two fields at a time are unpacked, by inline assembly."""
    return dtype in _HALVES and not INTERPRETED and torch.version.hip is None


def compute_type(dtype: torch.dtype) -> Any:
    """The type that matrices are multiplied in; sums are float32 always."""
    # The interpreter multiplies the bits of bfloat16 as if they were whole numbers.
    return tl.float32 if INTERPRETED else _HALVES.get(dtype, tl.float32)


def options(block_rows: int, block: int, dtype: torch.dtype) -> dict[str, int]:
    """Warps, by the size of what they hold in registers."""
    return {"num_warps": 8 if block_rows * block > 128 * 16 or dtype == torch.float32 else 4}


def splits_for(blocks: int, most: int, device: torch.device) -> int:
    """How often to cut the columns so that every multiprocessor has work: a power of two up to 8, since
    each number is compiled for itself.
    """
    if device.type != "cuda":
        return 1
    wanted = _BLOCKS_EACH * torch.cuda.get_device_properties(device).multi_processor_count
    splits = max(1, min(wanted // blocks, most, 8))
    return 1 << (splits.bit_length() - 1)
