"""Small codes packed into bytes, the same on every machine: low bits first, rows byte-aligned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def packed_width(columns: int, bits: int) -> int:
    """Bytes that `columns` codes of `bits` bits take."""
    return (columns * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8 `[..., M]` (int32 above 8 bits), values below `2 ** bits`.
        bits: 1 to 16.

    Returns:
        uint8 `[..., ceil(M * bits / 8)]`; unused high bits are zero.
    """
    assert 1 <= bits <= 16, bits
    if not codes.is_cpu:
        return pack(codes.cpu(), bits).to(codes.device)
    array = codes.numpy()
    if bits not in (1, 2, 4, 8):
        return torch.from_numpy(_pack_any(array, bits))
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
    """Undo `pack`: uint8 `[..., columns]`, int32 above 8 bits."""
    assert 1 <= bits <= 16, bits
    if not packed.is_cpu:
        return unpack(packed.cpu(), bits, columns).to(packed.device)
    array = packed.numpy()
    if bits not in (1, 2, 4, 8):
        return torch.from_numpy(_unpack_any(array, bits, columns))
    if bits == 1:
        bits_ = np.unpackbits(array, axis=-1, count=columns, bitorder="little")
        return torch.from_numpy(bits_)
    if bits == 8:
        return packed[..., :columns]
    per_byte, mask = 8 // bits, np.uint8(2**bits - 1)
    fields = [(array >> np.uint8(f * bits)) & mask for f in range(per_byte)]
    codes = np.stack(fields, axis=-1).reshape(*array.shape[:-1], array.shape[-1] * per_byte)
    return torch.from_numpy(np.ascontiguousarray(codes[..., :columns]))


def _pack_any(array: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Eight codes of b bits are b bytes; above 8 bits they no longer fit one 64-bit word."""
    *outer, columns = array.shape
    width = packed_width(columns, bits)
    array = np.pad(array, [(0, 0)] * len(outer) + [(0, -columns % 8)])
    if bits > 8:
        single = (array[..., None] >> np.arange(bits)) & 1
        flat = single.reshape(*outer, array.shape[-1] * bits).astype(np.uint8)
        return np.ascontiguousarray(np.packbits(flat, axis=-1, bitorder="little")[..., :width])
    eights = array.reshape(*outer, array.shape[-1] // 8, 8)
    words = np.zeros(eights.shape[:-1], dtype="<u8")
    for i in range(8):
        words |= eights[..., i].astype(np.uint64) << np.uint64(i * bits)
    raw = words[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(raw.reshape(*outer, raw.shape[-2] * bits)[..., :width])


def _unpack_any(array: NDArray[np.uint8], bits: int, columns: int) -> NDArray[Any]:
    outer = array.shape[:-1]
    if bits > 8:
        single = np.unpackbits(array, axis=-1, count=columns * bits, bitorder="little")
        powers = (1 << np.arange(bits)).astype(np.int32)
        values: NDArray[np.int64] = (single.reshape(*outer, columns, bits) * powers).sum(axis=-1)
        return values.astype(np.int32)
    eights = -(-columns // 8)
    array = np.pad(array, [(0, 0)] * len(outer) + [(0, eights * bits - array.shape[-1])])
    raw = np.zeros((*outer, eights, 8), dtype=np.uint8)
    raw[..., :bits] = array.reshape(*outer, eights, bits)
    words, mask = raw.view("<u8"), np.uint64(2**bits - 1)
    codes = np.empty((*outer, eights, 8), dtype=np.uint8)
    for i in range(8):
        codes[..., i] = (words[..., 0] >> np.uint64(i * bits)) & mask
    return np.ascontiguousarray(codes.reshape(*outer, eights * 8)[..., :columns])
