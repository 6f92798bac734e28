"""What programs of integer products do with words of codes.

Each program runs in Triton's interpreter too, which knows no instructions of a GPU; there ``TEXT``
is empty, and plain operations compute the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_bytes(word, WIDTH: tl.constexpr, OFFSET: tl.constexpr):
    """The ``WIDTH`` bits from bit ``OFFSET`` on of each of the four bytes of ``word``, in place."""
    byte: tl.constexpr = (2**WIDTH - 1) << OFFSET
    # Four times this byte, as an integer with a sign.
    mask: tl.constexpr = byte * 0x01010101 - byte // 128 * 2**32
    return word & mask


@triton.jit
def with_piece(codes, word, NUMBER: tl.constexpr, QUAD: tl.constexpr, BITS: tl.constexpr):
    """``codes`` of a quad and the bits of them that word ``NUMBER`` of the unit has, if any."""
    whole: tl.constexpr = 8 // BITS
    spare: tl.constexpr = 8 - whole * BITS
    first: tl.constexpr = (QUAD - whole * BITS) * BITS
    begin: tl.constexpr = NUMBER * spare
    low: tl.constexpr = first if first > begin else begin
    high: tl.constexpr = first + BITS if first + BITS < begin + spare else begin + spare
    if low < high:
        piece = in_bytes(word >> (whole * BITS + low - begin), high - low, 0)
        codes = codes | (piece << (low - first))
    return codes


@triton.jit
def put_together(words, QUAD: tl.constexpr, BITS: tl.constexpr):
    """The codes of a quad that is spread over several words, each in a byte."""
    codes = tl.zeros(words[0].shape, tl.int32)
    for number in tl.static_range(BITS):
        codes = with_piece(codes, words[number], number, QUAD, BITS)
    return codes


@triton.jit
def quad_of(words, QUAD: tl.constexpr, BITS: tl.constexpr):
    """The codes of a quad of each unit, each in a byte of an int32."""
    whole: tl.constexpr = 8 // BITS
    if whole * BITS > QUAD:
        codes = in_bytes(words[QUAD // whole] >> (QUAD % whole * BITS), BITS, 0)
    else:
        codes = put_together(words, QUAD, BITS)
    return codes


@triton.jit
def add_products(total, codes, x, TEXT: tl.constexpr):
    """``total`` and the products of four codes without a sign with four bytes that have one."""
    if TEXT != "":
        total = tl.inline_asm_elementwise(
            TEXT, "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for lane in tl.static_range(4):
            total += ((codes >> (8 * lane)) & 255) * ((x << (24 - 8 * lane)) >> 24)
    return total


@triton.jit
def unit_times(words, quads, BITS: tl.constexpr, TEXT: tl.constexpr):
    """Sums of the codes of units times activations, int32.

    ``words`` and ``quads`` are tuples of ``BITS`` and eight tensors. Codes are multiplied where
    they lie in their bytes, and each sum of those at one place is moved down at the end.
    """
    whole: tl.constexpr = 8 // BITS
    result = tl.zeros(words[0].shape, tl.int32)
    for place in tl.static_range(whole):
        total = tl.zeros(words[0].shape, tl.int32)
        for number in tl.static_range(BITS):
            codes = in_bytes(words[number], BITS, place * BITS)
            total = add_products(total, codes, quads[number * whole + place], TEXT)
        result += total >> (place * BITS)
    for quad in tl.static_range(whole * BITS, 8):
        result = add_products(result, put_together(words, quad, BITS), quads[quad], TEXT)
    return result
