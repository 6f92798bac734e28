"""Activations into the order of units, see `quantine.kernels.matrix.triton.arrange`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrange(
    x,
    source,
    halves,
    sums,
    factors,
    columns,
    UNITS: tl.constexpr,
    SPAN: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    IN_PAIRS: tl.constexpr,
):
    """Arrange a chunk of a row: see `quantine.kernels.matrix.triton.arrange`."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    x += row * columns
    # Every program finds the row's largest value for itself: that needs no second launch.
    largest = tl.zeros([WIDTH], tl.float32)
    for start in range(0, columns, WIDTH):
        at = start + tl.arange(0, WIDTH)
        value = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    # A float32's exponent counts from 127; that of the factor stays where its inverse exists.
    top = tl.max(largest, 0)
    exponent = (top.to(tl.int32, bitcast=True) >> 23) - (LARGEST - 1)
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    exponent = tl.where((top > 0) & (top < float("inf")), exponent, 127)
    tl.store(factors + row, (exponent << 23).to(tl.float32, bitcast=True))
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    place = chunk * WIDTH + tl.arange(0, WIDTH)
    inside = place < columns
    at = place
    if source is not None:
        at = tl.load(source + place, mask=inside, other=0)
    half = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse).to(tl.float16)
    target = row * 32 * UNITS + place
    if IN_PAIRS:
        unit, within = place // 32, place % 32
        target = ((row * 16 + within % 16) * UNITS + unit) * 2 + within // 16
    tl.store(halves + target, half, mask=place < UNITS * 32)
    if sums is not None:
        total = tl.sum(tl.reshape(half.to(tl.float32), [WIDTH // SPAN, SPAN]), 1)
        run = chunk * (WIDTH // SPAN) + tl.arange(0, WIDTH // SPAN)
        groups: tl.constexpr = UNITS * 32 // SPAN // PLANES
        target = (row * PLANES + run % PLANES) * groups + run // PLANES
        tl.store(sums + target, total, mask=run < groups * PLANES)
