"""Small codes packed into bytes, the same on every machine: low bits first, rows byte-aligned."""

from __future__ import annotations

import numpy as np
import torch


def packed_width(columns: int, bits: int) -> int:
    """Bytes that `columns` codes of `bits` bits take."""
    return (columns * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8 `[..., M]`, values below `2 ** bits`.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 `[..., ceil(M * bits / 8)]`; unused high bits are zero.
    """
    assert bits in (1, 2, 4, 8), bits
    array = codes.numpy()
    if bits == 1:
        return torch.from_numpy(np.packbits(array, axis=-1, bitorder="little"))
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    padding = -array.shape[-1] % per_byte
    if padding:
        array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, padding)])
    array = array.reshape(*array.shape[:-1], array.shape[-1] // per_byte, per_byte)
    packed = np.zeros(array.shape[:-1], dtype=np.uint8)
    for field in range(per_byte):
        packed |= array[..., field] << np.uint8(field * bits)
    return torch.from_numpy(packed)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Undo `pack`: uint8 `[..., columns]`."""
    assert bits in (1, 2, 4, 8), bits
    array = packed.numpy()
    if bits == 1:
        bits_ = np.unpackbits(array, axis=-1, count=columns, bitorder="little")
        return torch.from_numpy(bits_)
    if bits == 8:
        return packed[..., :columns]
    per_byte, mask = 8 // bits, np.uint8(2**bits - 1)
    fields = [(array >> np.uint8(f * bits)) & mask for f in range(per_byte)]
    codes = np.stack(fields, axis=-1).reshape(*array.shape[:-1], array.shape[-1] * per_byte)
    return torch.from_numpy(np.ascontiguousarray(codes[..., :columns]))
