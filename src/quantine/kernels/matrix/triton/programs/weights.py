"""Weights of units, decoded in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.matrix.triton.programs.parts import (
    code_of,
    high_half,
    low_half,
    take_statistics,
    take_words,
)


@triton.jit
def _codes(words, BITS: tl.constexpr, UNIT_TEXT: tl.constexpr, UNIT_CONSTRAINTS: tl.constexpr):
    """Codes of units less the middle one, float16: 16 of low halves, and 16 of high halves."""
    low, high = (), ()
    if UNIT_TEXT != "":
        pairs = tl.inline_asm_elementwise(
            UNIT_TEXT, UNIT_CONSTRAINTS, words, dtype=(tl.int32,) * 16, is_pure=True, pack=1
        )
        for pair in tl.static_range(16):
            low, high = low + (low_half(pairs[pair]),), high + (high_half(pairs[pair]),)
    else:
        middle: tl.constexpr = 2 ** (BITS - 1)
        for pair in tl.static_range(16):
            low = low + ((code_of(words, pair, 0, BITS) - middle).to(tl.float16),)
            high = high + ((code_of(words, pair, 1, BITS) - middle).to(tl.float16),)
    return low, high


@triton.jit
def _side_by_side(low, high, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Weights of all pairs in stored order, ``[ROWS, 32 * WIDTH]``."""
    # Each join adds the next lower bit of a weight's number in its unit: its half, then its pair.
    level = ()
    for pair in tl.static_range(16):
        level = level + (tl.join(low[pair], high[pair]),)
    for step in tl.static_range(4):
        joined = ()
        for pair in tl.static_range(8 >> step):
            joined = joined + (tl.join(level[pair], level[pair + (8 >> step)]),)
        level = joined
    return tl.reshape(level[0], [ROWS, WIDTH * 32])


@triton.jit
def take_weights(
    words,
    fields,
    scale_grids,
    zero_grids,
    factor,
    row,
    rows,
    unit,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALONG_OUTPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    PLANES: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    UNIT_TEXT: tl.constexpr,
    UNIT_CONSTRAINTS: tl.constexpr,
):
    """Weights of units ``[WIDTH]`` of rows ``[ROWS]`` over ``factor`` ``[ROWS]``.

    Returns ``[ROWS, 32 * WIDTH]``.
    They are float16, without outliers, in stored order. Where groups run along outputs, ``fields``
    are their scales and ``scale_grids`` their zero points, see `ColumnGroups`.
    """
    units_of_group: tl.constexpr = SPAN // 32 if SPAN >= 32 else 1
    groups: tl.constexpr = UNITS // units_of_group
    low, high = _codes(
        take_words(words, row, unit, UNITS, BITS, True), BITS, UNIT_TEXT, UNIT_CONSTRAINTS
    )
    low_weights, high_weights = (), ()
    if ALONG_OUTPUTS:
        for pair in tl.static_range(16):
            at = ((row // SIZE * 16 + pair) * UNITS)[:, None] + unit[None, :]
            scale = tl.load(fields + at)
            one, other = low[pair], high[pair]
            if scale_grids is not None:  # these are the zero points
                zero = tl.load(scale_grids + at)
                one, other = one - low_half(zero), other - high_half(zero)
            low_weights = low_weights + (one * low_half(scale),)
            high_weights = high_weights + (other * high_half(scale),)
    else:
        scales, zeros = (), ()
        for plane in tl.static_range(PLANES):
            scale, zero = take_statistics(
                fields,
                scale_grids,
                zero_grids,
                row,
                rows,
                row // SIZE,
                plane,
                unit // units_of_group,
                BITS,
                groups,
                PLANES,
                SCALE_BITS,
                ZERO_BITS,
                1,
            )
            scales = scales + ((scale / factor[:, None]).to(tl.float16),)
            zeros = zeros + (zero,)
        for pair in tl.static_range(16):
            one, other = low[pair].to(tl.float32), high[pair].to(tl.float32)
            if ZERO_BITS != 0:
                one, other = one - zeros[0], other - zeros[PLANES - 1]
            low_weights = low_weights + (one.to(tl.float16) * scales[0],)
            high_weights = high_weights + (other.to(tl.float16) * scales[PLANES - 1],)
    return _side_by_side(low_weights, high_weights, ROWS, WIDTH)
