"""Keys and values to packed codes, see `quantine.kernels.kv_attention.triton.packing`."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.programs.whole_numbers import nearest_code


@triton.jit
def _encoded(x, scale, zero, BITS: tl.constexpr):
    """The nearest codes of ``x``, as floats: see `quantine.core.grid.encode`."""
    return nearest_code(tl.div_rn(x, scale) + zero, BITS)


@triton.jit
def _fed(
    rest,
    scale,
    zero,
    feedback,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``rest`` ``[TOKENS, WIDTH]``, each channel less what errors of those before it subtract."""
    channel = tl.arange(0, WIDTH)
    share = tl.load(feedback + channel, mask=channel < DIM, other=0.0)
    for number in range(DIM):
        # The next row is asked for before this one is needed.
        behind = feedback + (number + 1) * DIM + channel
        following = tl.load(behind, mask=(channel < DIM) & (number + 1 < DIM), other=0.0)
        # A register has no number at run time: the channel is what is left beside zeros.
        x = tl.sum(tl.where((channel == number)[None, :], rest, 0.0), 1)
        own_scale, own_zero = tl.load(scale + number), tl.load(zero + number)
        error = x - own_scale * (_encoded(x, own_scale, own_zero, BITS) - own_zero)
        less = rest - error[:, None] * share.to(tl.float32)[None, :]
        rest = tl.where((channel > number)[None, :], less, rest)
        share = following
    return rest


@triton.jit
def _word(codes, number: tl.constexpr, BITS: tl.constexpr, CODES: tl.constexpr):
    """Word ``number`` of pieces whose codes are ``[TOKENS, pieces, CODES]``."""
    place = tl.arange(0, CODES) * BITS - 32 * number
    up = tl.minimum(tl.maximum(place, 0), 31).to(tl.uint32)
    down = tl.minimum(tl.maximum(-place, 0), 31).to(tl.uint32)
    there = ((place > -BITS) & (place < 32))[None, None, :]
    return tl.sum(tl.where(there, (codes << up[None, None, :]) >> down[None, None, :], 0), 2)


@triton.jit
def round_to_codes(
    states,
    scale,
    zero,
    feedback,
    packed,
    start,
    tokens,
    room,
    sample_stride,
    head_stride,
    token_stride,
    channel_stride,
    packed_sample_stride,
    packed_head_stride,
    packed_token_stride,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
):
    """Round ``TOKENS`` tokens of a head and pack their codes.

    ``start`` points to the place of the first of all tokens; without it, that is 0.
    """
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    channel = tl.arange(0, WIDTH)
    real = channel < DIM
    at = token.to(tl.int64)[:, None] * token_stride + channel[None, :] * channel_stride
    at += sample * sample_stride + head.to(tl.int64) * head_stride
    x = tl.load(states + at, mask=there[:, None] & real[None, :], other=0.0).to(tl.float32)
    scale += head * DIM
    zero += head * DIM
    if feedback is not None:
        x = _fed(x, scale, zero, feedback + head * DIM * DIM, BITS, DIM, WIDTH)
    own_scale = tl.load(scale + channel, mask=real, other=1.0)[None, :]
    own_zero = tl.load(zero + channel, mask=real, other=0.0)[None, :]
    codes = tl.where(real[None, :], _encoded(x, own_scale, own_zero, BITS), 0.0)
    pieces: tl.constexpr = WIDTH // CODES
    codes = tl.reshape(codes.to(tl.int32).to(tl.uint32), [TOKENS, pieces, CODES])
    row_bytes: tl.constexpr = (DIM * BITS + 7) // 8
    packed += sample * packed_sample_stride + head.to(tl.int64) * packed_head_stride
    place_of_token = token.to(tl.int64)
    if start is not None:
        place_of_token += tl.load(start)
        there = there & (place_of_token >= 0) & (place_of_token < room)
    line = place_of_token[:, None] * packed_token_stride
    for number in tl.static_range(WORDS):
        word = _word(codes, number, BITS, CODES)
        for octet in tl.static_range(4):
            place = (tl.arange(0, pieces) * WORDS + number) * 4 + octet
            held = there[:, None] & (place < row_bytes)[None, :]
            tl.store(packed + line + place[None, :], (word >> 8 * octet).to(tl.uint8), mask=held)
