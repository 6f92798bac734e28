"""Packed codes of keys and values, decoded in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def paired(x, BITS: tl.constexpr):
    """``x`` ``[n, width]`` with its columns, the channels, in the order of `take_codes`.

    Columns of a piece are its pairs one after another: code ``p``, then ``p`` of the second half.
    """
    half: tl.constexpr = 16 // (BITS & -BITS)
    pieces = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * half), 2, half])
    return tl.reshape(tl.trans(pieces, (0, 1, 3, 2)), [x.shape[0], x.shape[1]])


@triton.jit
def unpaired(x, BITS: tl.constexpr):
    """What `paired` made ``x`` of."""
    half: tl.constexpr = 16 // (BITS & -BITS)
    pieces = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * half), half, 2])
    return tl.reshape(tl.trans(pieces, (0, 1, 3, 2)), [x.shape[0], x.shape[1]])


@triton.jit
def _word(packed, token, number, inside, ROW_BYTES: tl.constexpr):
    """Words ``number`` ``[n]`` of tokens ``token`` ``[m]``, zero beyond a row's bytes."""
    if ROW_BYTES % 4 == 0:  # ``packed`` points to words
        held = inside[:, None] & (number < ROW_BYTES // 4)[None, :]
        word = tl.load(
            packed + token[:, None] * (ROW_BYTES // 4) + number[None, :], mask=held, other=0
        )
        word = word.to(tl.uint32, bitcast=True)
    else:
        word = tl.zeros([token.shape[0], number.shape[0]], tl.uint32)
        for octet in tl.static_range(4):
            place = number * 4 + octet
            held = inside[:, None] & (place < ROW_BYTES)[None, :]
            at = packed + token[:, None] * ROW_BYTES + place[None, :]
            word |= tl.load(at, mask=held, other=0).to(tl.uint32) << 8 * octet
    return word


@triton.jit
def _bits_from(words, start: tl.constexpr, WORDS: tl.constexpr):
    """16 bits of pieces from bit ``start`` on, or those up to the end, in the lower half."""
    number: tl.constexpr = start // 32
    by: tl.constexpr = start % 32
    found = words[number] >> by
    if by > 16 and number + 1 < WORDS:
        found |= words[number + 1] << (32 - by)
    return found


@triton.jit
def _pairs(words, BITS: tl.constexpr):
    """Pairs of codes: words whose halves hold a code each, over those bits that make it 1024 more.

    A half of a word is the float16 ``1024 + code``. The first codes of a piece's two halves are
    the first pair.
    """
    count: tl.constexpr = 16 // (BITS & -BITS)
    whole: tl.constexpr = 16 // BITS
    second: tl.constexpr = count * BITS
    mask: tl.constexpr = (2**BITS - 1) * 0x10001
    pairs = ()
    for first in tl.static_range(0, count, whole):
        if BITS & (BITS - 1) == 0:
            both = words[0]
        else:
            low = _bits_from(words, first * BITS, BITS // (BITS & -BITS))
            high = _bits_from(words, second + first * BITS, BITS // (BITS & -BITS))
            both = (low & 0xFFFF) | (high << 16)
        for number in tl.static_range(whole):
            if first + number < count:
                pairs = pairs + (((both >> number * BITS) & mask) | 0x64006400,)
    return pairs


@triton.jit
def take_codes(
    packed, token, inside, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, WIDTH: tl.constexpr
):
    """Codes of tokens ``token`` ``[m]`` less the middle code, float16 ``[m, WIDTH]``.

    `paired` says what the columns are. Codes of channels that a row does not have, and of tokens
    that are not ``inside``, are those of zeros.
    """
    shared: tl.constexpr = BITS & -BITS
    count: tl.constexpr = BITS // shared
    pieces: tl.constexpr = WIDTH * shared // 32
    words = ()
    for number in tl.static_range(count):
        place = tl.arange(0, pieces) * count + number
        words = words + (_word(packed, token, place, inside, ROW_BYTES),)
    level = _pairs(words, BITS)
    # Each join adds the next lower bit of a pair's number.
    half: tl.constexpr = 8 // shared
    for step in tl.static_range(4):
        if half >> step > 0:
            joined = ()
            for pair in tl.static_range(half >> step):
                joined = joined + (tl.join(level[pair], level[pair + (half >> step)]),)
            level = joined
    pairs = tl.reshape(level[0], [token.shape[0], WIDTH // 2])
    halves = tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))
    codes = tl.reshape(halves, [token.shape[0], WIDTH]).to(tl.float16, bitcast=True)
    return codes - (1024.0 + 2 ** (BITS - 1))
