"""Norm, order, token factor and rounding of a row of activations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_row(
    x,
    source,
    counts,
    steps,
    zeros,
    above,
    below,
    weight,
    bias,
    eps,
    codes,
    sums,
    scales,
    shifts,
    columns,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    CENTRED: tl.constexpr,
    IN_QUADS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST_SHARE: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
):
    """Round one row: see `quantine.kernels.integer.triton.rounding`."""
    row = tl.program_id(0).to(tl.int64)
    top: tl.constexpr = 2**BITS - 1
    middle: tl.constexpr = 2 ** (BITS - 1)
    unit = tl.arange(0, WIDTH)
    held = unit < UNITS
    number = tl.arange(0, 32)
    place = unit[:, None] * 32 + number[None, :]
    # What fills up units stays in them, and is no more than a condition from here on.
    there = number[None, :] < tl.load(counts + unit, mask=held, other=0)[:, None]
    at = tl.load(source + place, mask=held[:, None], other=0)
    value = tl.load(x + row * columns + at, mask=there, other=0.0).to(tl.float32)
    if weight is not None:
        if CENTRED:
            value = tl.where(there, value - tl.sum(value) / columns, 0.0)
        value *= tl.rsqrt(tl.sum(value * value) / columns + eps)
        value *= tl.load(weight + place, mask=held[:, None], other=0.0)
        if bias is not None:
            value += tl.load(bias + place, mask=held[:, None], other=0.0)
    lost = tl.max((value != value).to(tl.int32)) != 0
    value = tl.where(lost, 0.0, value)
    shift = 1.0
    if steps is not None:
        step = tl.load(steps + unit, mask=held, other=1.0)[:, None]
        zero = tl.load(zeros + unit, mask=held, other=0.0)[:, None]
        scale = 1.0
        if above is not None:
            finite = tl.minimum(tl.maximum(value, -3.4028234663852886e38), 3.4028234663852886e38)
            asked = finite * tl.load(above + unit, mask=held, other=0.0)[:, None]
            other = finite * tl.load(below + unit, mask=held, other=0.0)[:, None]
            scale = tl.max(tl.maximum(asked, other))
            scale = tl.minimum(tl.maximum(scale, SMALLEST), LARGEST)
            value = tl.div_rn(value, scale)
    else:
        infinity = float("inf")
        low = tl.min(tl.where(there, value, infinity))
        high = tl.max(tl.where(there, value, -infinity))
        lost = lost | (high - low == infinity)
        low, high = tl.where(lost, 0.0, low), tl.where(lost, 0.0, high)
        value = tl.where(lost, 0.0, value)
        least = tl.maximum(tl.maximum(tl.abs(low), tl.abs(high)) * LEAST_SHARE, LEAST_SCALE)
        scale = tl.maximum(tl.div_rn(high - low, top + 0.0), least)
        # Adding 3 * 2**22 rounds to a whole number, to even in between; its magnitude is 2**22 at
        # most.
        zero = (tl.div_rn(-low, scale) + 12582912.0) - 12582912.0
        shift = zero - middle
        step = scale
    code = tl.minimum(tl.maximum(tl.div_rn(value, step) + zero, 0.0), top + 0.0)
    # Adding 2**23 rounds, and leaves the whole number in the lowest bits.
    code = ((code + 8388608.0).to(tl.int32, bitcast=True) & 255) - middle
    code = tl.where(there, code, 0)
    target = place
    if IN_QUADS:
        target = (number // 4)[None, :] * (UNITS * 4) + unit[:, None] * 4 + (number % 4)[None, :]
    tl.store(codes + row * (UNITS * 32) + target, code.to(tl.int8), mask=held[:, None])
    tl.store(sums + row * UNITS + unit, tl.sum(code, 1).to(tl.float32), mask=held)
    tl.store(scales + row, tl.where(lost, float("nan"), scale))
    tl.store(shifts + row, shift)
