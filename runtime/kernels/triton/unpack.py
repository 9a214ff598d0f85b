"""Fields of words as numbers, inside kernels.

The number that a field stands for is exact in bfloat16 and float16, so nothing is lost here. On NVIDIA
GPUs two neighbouring 16-bit words are unpacked at once, in a 32-bit register: the field is cut out and
put into the mantissa of a constant by one logical operation, and one fused multiply-add takes the
constant away. Where the field may stay in place no shift is needed. Everywhere else, and in float32,
the same is said in plain Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

#: Whether kernels run in Triton's interpreter, on tensors of the CPU. Fixed when Triton is imported.
INTERPRETED: bool = bool(knobs.runtime.interpret)


@triton.constexpr_function
def _half_bits(value: float, bfloat: bool) -> int:
    """A number that is exact in the 16-bit type, as its bits, twice."""
    mantissa, bias = (7, 127) if bfloat else (10, 15)
    magnitude, exponent = abs(value), 0
    while magnitude >= 2:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 1:
        magnitude, exponent = magnitude * 2, exponent - 1
    digits = (magnitude - 1) * 2**mantissa
    assert digits == int(digits), "not exact in 16 bits"
    bits = (exponent + bias) << mantissa | int(digits) | (0x8000 if value < 0 else 0)
    return bits * 0x10001


@triton.constexpr_function
def unpack_code(bits: int, field: int, bfloat: bool) -> str:
    """PTX that turns two words into two numbers; see `field_values`.

    Raises no error for any bits in {1, 2, 4}: every constant it needs is exact, which is asserted.
    """
    if bits == 1 and field in (0, 15):
        # The field is the sign of 1 (with 0 for plus, so it is inverted on the way).
        shift = "shl.b32 t, $1, 15;" if field == 0 else "mov.b32 t, $1;"
        one = _half_bits(1.0, bfloat)
        # (t & 0x8000) ^ -1.0
        return (
            f"{{ .reg .b32 t; {shift} lop3.b32 $0, t, 0x80008000, {one | 0x80008000:#x}, 0x6a; }}"
        )
    mantissa, first = (7, 1 if bits == 1 else 0) if bfloat else (10, 1 if bits == 1 else 0)
    place, shift = _place(bits, field, first)
    constant, weight = 2.0**mantissa, 2.0**place
    if place >= mantissa:
        # The lowest bit of the exponent: 1/2 or 1.
        constant, multiply, add = 0.5, 4.0, -3.0
    elif bits == 1:
        multiply, add = 2.0 / weight, -(2.0 * constant / weight + 1.0)
    else:
        multiply, add = 1.0 / weight, -(constant / weight + 2.0 ** (bits - 1))
    mask = ((2**bits - 1) << place) * 0x10001
    kind = "bf16x2" if bfloat else "f16x2"
    move = f"shr.u32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    return (
        f"{{ .reg .b32 t, m, a; {move} "
        f"lop3.b32 t, t, {mask:#x}, {_half_bits(constant, bfloat):#x}, 0xea; "
        f"mov.b32 m, {_half_bits(multiply, bfloat):#x}; mov.b32 a, {_half_bits(add, bfloat):#x}; "
        f"fma.rn.{kind} $0, t, m, a; }}"
    )


@triton.constexpr_function
def _place(bits: int, field: int, first: int) -> tuple[int, int]:
    """Bit at which a field is cut out, and the shift that brings it there."""
    if bits == 1:
        return (field, 0) if field <= 7 else (field - 7, 7)
    if bits == 2:
        return 2 * (field % 3), 6 * (field // 3)
    return first, 4 * field


@triton.jit
def field_values(  # type: ignore[no-untyped-def]
    words, FIELD: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr, PAIRS: tl.constexpr
):
    # int16 words to COMPUTE numbers of the same shape: signs for 1 bit, else centred.
    if PAIRS and tl.bfloat16 == COMPUTE:
        return tl.inline_asm_elementwise(
            unpack_code(BITS, FIELD, True), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif PAIRS:
        return tl.inline_asm_elementwise(
            unpack_code(BITS, FIELD, False), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        field = (words.to(tl.int32) >> (BITS * FIELD)) & ((1 << BITS) - 1)
        if BITS == 1:
            return (field * 2 - 1).to(COMPUTE)
        else:
            return (field - (1 << (BITS - 1))).to(COMPUTE)
