"""Norm, order, token factor and rounding of a row of activations.

A row is taken in parts of ``WIDTH`` units. Where one part is the whole row, the compiler leaves
nothing of the loops, and the row is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.programs.whole_numbers import to_whole


@triton.jit
def take_centred(x, source, counts, unit, mean, UNITS: tl.constexpr):
    """Channels of units ``[n]`` less ``mean``, ``[n, 32]``, which they are, and which are there.

    What fills up units is zero.
    """
    held = unit < UNITS
    number = tl.arange(0, 32)[None, :]
    there = number < tl.load(counts + unit, mask=held, other=0)[:, None]
    at = tl.load(source + unit[:, None] * 32 + number, mask=held[:, None], other=0)
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    return tl.where(there, value - mean, 0.0), at, there


@triton.jit
def take_normed(x, source, counts, weight, bias, unit, mean, inverse, UNITS: tl.constexpr):
    """As `take_centred`, but after the norm with this mean and inverse deviation."""
    value, at, there = take_centred(x, source, counts, unit, mean, UNITS)
    if weight is not None:
        value = weigh(value * inverse, weight, bias, at, there)
    return value, there


@triton.jit
def weigh(value, weight, bias, at, there):
    """Values of the channels ``at``, those that are ``there``, times their weights, and biases."""
    value = value * tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + at, mask=there, other=0.0).to(tl.float32)
    return value


@triton.jit
def write_normed(
    x, order, weight, bias, mean, inverse, normed, columns, first, COUNT: tl.constexpr
):
    """Inputs ``first`` to ``first + COUNT - 1``, as the norm writes them, to ``normed``."""
    place = first + tl.arange(0, COUNT)
    there = place < columns
    at = place if order is None else tl.load(order + place, mask=there, other=0)
    value = (tl.load(x + at, mask=there, other=0.0).to(tl.float32) - mean) * inverse
    value = weigh(value, weight, bias, at, there)
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=there)


@triton.jit
def round_row(
    x,
    source,
    counts,
    steps,
    zeros,
    above,
    below,
    order,
    weight,
    bias,
    eps,
    normed,
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
    x += row * columns
    top: tl.constexpr = 2.0**BITS - 1
    middle: tl.constexpr = 2 ** (BITS - 1)
    mean, inverse = 0.0, 1.0
    if CENTRED:
        for start in range(0, UNITS, WIDTH):
            unit = start + tl.arange(0, WIDTH)
            value, _at, there = take_centred(x, source, counts, unit, 0.0, UNITS)
            mean += tl.sum(value)
        mean /= columns
    if weight is not None:
        square = 0.0
        for start in range(0, UNITS, WIDTH):
            unit = start + tl.arange(0, WIDTH)
            value, _at, there = take_centred(x, source, counts, unit, mean, UNITS)
            square += tl.sum(value * value)
        inverse = tl.rsqrt(square / columns + eps)
    largest: tl.constexpr = 3.4028234663852886e38
    strange, asked, low, high = 0, 0.0, float("inf"), float("-inf")
    for start in range(0, UNITS, WIDTH):
        unit = start + tl.arange(0, WIDTH)
        held = unit < UNITS
        value, there = take_normed(x, source, counts, weight, bias, unit, mean, inverse, UNITS)
        strange = tl.maximum(strange, tl.max((value != value).to(tl.int32)))
        if above is not None:
            finite = tl.minimum(tl.maximum(value, -largest), largest)
            one = finite * tl.load(above + unit, mask=held, other=0.0)[:, None]
            other = finite * tl.load(below + unit, mask=held, other=0.0)[:, None]
            asked = tl.maximum(asked, tl.max(tl.maximum(one, other)))
        if steps is None:
            low = tl.minimum(low, tl.min(tl.where(there, value, float("inf"))))
            high = tl.maximum(high, tl.max(tl.where(there, value, float("-inf"))))
    lost = strange != 0
    scale, shift = 1.0, 1.0
    if above is not None:
        scale = tl.minimum(tl.maximum(asked, SMALLEST), LARGEST)
    if steps is None:
        lost = lost | (high > largest) | (low < -largest)
        low, high = tl.where(lost, 0.0, low), tl.where(lost, 0.0, high)
        lost = lost | (high - low == float("inf"))
        low, high = tl.where(lost, 0.0, low), tl.where(lost, 0.0, high)
        least = tl.maximum(tl.maximum(tl.abs(low), tl.abs(high)) * LEAST_SHARE, LEAST_SCALE)
        scale = tl.maximum(tl.div_rn(high - low, top), least)
        zero = to_whole(tl.div_rn(-low, scale))
        shift = zero - middle
    for start in range(0, UNITS, WIDTH):
        unit = start + tl.arange(0, WIDTH)
        held = unit < UNITS
        value, there = take_normed(x, source, counts, weight, bias, unit, mean, inverse, UNITS)
        number = tl.arange(0, 32)[None, :]
        value = tl.where(lost, 0.0, value)
        if above is not None:
            value = tl.div_rn(value, scale)
        if steps is not None:
            step = tl.load(steps + unit, mask=held, other=1.0)[:, None]
            value = tl.div_rn(value, step) + tl.load(zeros + unit, mask=held, other=0.0)[:, None]
        else:
            value = tl.div_rn(value, scale) + zero
        # Adding 2**23 rounds, to even in between, and leaves the code in the lowest bits.
        value = tl.minimum(tl.maximum(value, 0.0), top) + 8388608.0
        code = (value.to(tl.int32, bitcast=True) & 255) - middle
        code = tl.where(there & (lost == 0), code, 0)
        target = unit[:, None] * 32 + number
        if IN_QUADS:
            target = number // 4 * (UNITS * 4) + unit[:, None] * 4 + number % 4
        tl.store(codes + row * (UNITS * 32) + target, code.to(tl.int8), mask=held[:, None])
        tl.store(sums + row * UNITS + unit, tl.sum(code, 1).to(tl.float32), mask=held)
    tl.store(scales + row, tl.where(lost, float("nan"), scale))
    tl.store(shifts + row, tl.where(lost, 0.0, shift))
    if normed is not None:
        normed += row * columns
        for start in range(0, UNITS, WIDTH):
            write_normed(
                x, order, weight, bias, mean, inverse, normed, columns, start * 32, WIDTH * 32
            )
