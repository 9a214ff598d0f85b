"""Packed codes: round trips, and the bit order that the format fixes."""

from __future__ import annotations

import pytest
import torch

from deltafold.compress.bits import pack, packed_width, unpack


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16])
@pytest.mark.parametrize("shape", [(1,), (9,), (3, 8), (3, 17), (2, 3, 5), (4, 0), (0, 5), (0,)])
def test_round_trip(bits, shape):
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, generator=draw)
    codes = codes.to(torch.uint8 if bits <= 8 else torch.int32)
    packed = pack(codes, bits)
    assert tuple(packed.shape) == (*shape[:-1], packed_width(shape[-1], bits))
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0b00000001, 0b00000011]),
        (1, [0, 0, 0, 0, 0, 0, 0, 1], [0b10000000]),
        (2, [1, 2, 3, 0, 1], [0b00111001, 0b00000001]),
        (3, [1, 2, 7, 4], [0b11010001, 0b00001001]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (8, [7, 255], [7, 255]),
        (9, [0x101, 2], [0b00000001, 0b00000101, 0]),
    ],
)
def test_low_bits_come_first_and_the_rest_is_zero(bits, codes, expected):
    dtype = torch.uint8 if bits <= 8 else torch.int32
    assert pack(torch.tensor(codes, dtype=dtype), bits).tolist() == expected
