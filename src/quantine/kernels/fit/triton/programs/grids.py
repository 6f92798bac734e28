"""Grids of ranges, and what they cost: `quantine.kernels.fit.grid_cost` for a tile in registers.

A tile is ``[n, lines]``: the weights of one group in each of some lines, each line by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.programs.whole_numbers import nearest_code

SMALLEST_SCALE = tl.constexpr(2.0**-24)
"""`quantine.core.fit_range.SMALLEST_SCALE`."""
LARGEST_HALF = tl.constexpr(65504.0)
"""Largest finite float16."""
FIRST_INFINITE = tl.constexpr(65520.0)
"""Least magnitude that float16 rounds to infinity."""
SMALLEST_DIVISOR = tl.constexpr(1e-9)
"""`quantine.kernels.fit.grid_cost.SMALLEST_DIVISOR`."""


@triton.jit
def to_half(x):
    """``x`` rounded to the nearest finite float16, in float32."""
    x = tl.minimum(tl.maximum(x, -LARGEST_HALF), LARGEST_HALF)
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def report(misfits, kind: tl.constexpr, values, fit):
    """Note the largest of ``values`` that do not ``fit`` into float16 in ``misfits[kind]``.

    ``kind`` is a place in `quantine.kernels.fit.misfit.KINDS`.
    """
    largest = tl.max(tl.where(fit, 0.0, tl.where(values > 0.0, values, float("inf"))), 0)
    if largest > 0.0:
        tl.atomic_max(misfits + kind, largest)


@triton.jit
def whole_scale(low, high, BITS: tl.constexpr, SYM: tl.constexpr):
    """The scale that the range needs if zero is on its grid, before it is rounded."""
    if SYM:
        above = tl.div_rn(high, 2.0 ** (BITS - 1) - 1)
        return tl.maximum(above, tl.div_rn(-low, 2.0 ** (BITS - 1)))
    return tl.div_rn(tl.maximum(high, 0.0) - tl.minimum(low, 0.0), 2.0**BITS - 1)


@triton.jit
def cover(low, high, BITS: tl.constexpr, SYM: tl.constexpr, FARTHEST: tl.constexpr):
    """Scale and zero point of a range: `quantine.kernels.fit.reference.cover`.

    Zero points are whole where ``FARTHEST`` is ``None``.
    """
    if FARTHEST is None:
        scale = to_half(tl.maximum(whole_scale(low, high, BITS, SYM), SMALLEST_SCALE))
        if SYM:
            zero = tl.zeros_like(scale) + 2.0 ** (BITS - 1)
        else:
            zero = nearest_code(tl.div_rn(-tl.minimum(low, 0.0), scale), BITS)
    else:
        reach = tl.maximum(tl.abs(low), tl.abs(high))
        distant = high - low <= tl.div_rn(reach, FARTHEST)
        low = tl.where(distant, tl.minimum(low, 0.0), low)
        high = tl.where(distant, tl.maximum(high, 0.0), high)
        scale = tl.maximum(tl.div_rn(high - low, 2.0**BITS - 1), SMALLEST_SCALE)
        zero = tl.div_rn(-low, scale)
    return scale, zero


@triton.jit
def squared_errors(tile, scale, zero, BITS: tl.constexpr):
    """Squared rounding errors of a tile on a grid of each line; scales are positive."""
    inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    code = nearest_code(tile * inverse[None, :] + zero[None, :], BITS)
    error = (code - zero[None, :]) * scale[None, :] - tile
    return error * error


@triton.jit
def cost_of(tile, held, importance, price, scale, zero, BITS: tl.constexpr, POWER: tl.constexpr):
    """The cost of a grid of each line: `quantine.kernels.fit.grid_cost.GridCost`.

    Args:
        tile: ``[n, lines]`` float32.
        held: ``[n, 1]``, whether a place of the tile is a weight.
        importance: ``[n, 1]`` or ``[1, lines]``, what squared errors are multiplied by.
        price: most that one weight costs.
        scale, zero: ``[lines]``, scales positive.
        POWER: whether the cost is ``"mse"``, which knows neither importance nor price.
    """
    square = squared_errors(tile, scale, zero, BITS)
    if POWER:  # |error| ** 2.4 is error**2 ** 1.2
        cost = tl.exp2(1.2 * tl.log2(tl.maximum(square, 1e-36)))
    else:
        cost = tl.minimum(square * importance, price)
    return tl.sum(tl.where(held, cost, 0.0), 0)


@triton.jit
def cheapest_range(
    tile,
    inliers,
    held,
    importance,
    price,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    FARTHEST: tl.constexpr,
    CLIP: tl.constexpr,
    SHRINKS: tl.constexpr,
):
    """Scale and zero point ``[lines]`` of the whole range of ``inliers``, or of the best share.

    Args:
        tile: the weights whose errors count; other arguments as for `cost_of`.
        inliers: the weights that the range has to cover.
        SHRINKS: number of shares that are tried: 1, 0.975, 0.95 and so on.
    """
    low = tl.min(tl.where(held, inliers, float("inf")), 0)
    high = tl.max(tl.where(held, inliers, float("-inf")), 0)
    scale, zero = cover(low, high, BITS, SYM, FARTHEST)
    if CLIP != "minmax":
        middle = tl.zeros_like(low)
        if FARTHEST is not None:
            middle = (low + high) * 0.5
        least = tl.zeros_like(low) + float("inf")
        fortieths = tl.zeros_like(low) + 40.0
        for _ in range(SHRINKS):
            share = tl.div_rn(fortieths, 40.0)
            lower = middle + (low - middle) * share
            upper = middle + (high - middle) * share
            scale_tried, zero_tried = cover(lower, upper, BITS, SYM, FARTHEST)
            cost = cost_of(
                tile, held, importance, price, scale_tried, zero_tried, BITS, CLIP == "mse"
            )
            better = cost < least
            least = tl.where(better, cost, least)
            scale = tl.where(better, scale_tried, scale)
            zero = tl.where(better, zero_tried, zero)
            fortieths -= 1.0
    return scale, zero


@triton.jit
def without_outliers(
    tile,
    held,
    importance,
    price,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    FARTHEST: tl.constexpr,
):
    """The tile without likely outliers: `quantine.kernels.fit.reference.without_outliers`."""
    size: tl.constexpr = tile.shape[0]
    number = tl.arange(0, size)[:, None]
    low = tl.min(tl.where(held, tile, float("inf")), 0)
    high = tl.max(tl.where(held, tile, float("-inf")), 0)
    first = tl.min(tl.where(held & (tile == low[None, :]), number, size), 0)
    last = tl.max(tl.where(held & (tile == high[None, :]), number, -1), 0)
    is_low, is_high = number == first[None, :], number == last[None, :]
    next_low = tl.min(tl.where(held & (number != first[None, :]), tile, float("inf")), 0)
    next_high = tl.max(tl.where(held & (number != last[None, :]), tile, float("-inf")), 0)
    scale, zero = cover(low, high, BITS, SYM, FARTHEST)
    saved = tl.where(held, squared_errors(tile, scale, zero, BITS) * importance, 0.0)
    whole = tl.sum(saved, 0)
    scale, zero = cover(next_low, high, BITS, SYM, FARTHEST)
    others = squared_errors(tile, scale, zero, BITS) * importance
    saved_low = whole - tl.sum(tl.where(held & (number != first[None, :]), others, 0.0), 0)
    scale, zero = cover(low, next_high, BITS, SYM, FARTHEST)
    others = squared_errors(tile, scale, zero, BITS) * importance
    saved_high = whole - tl.sum(tl.where(held & (number != last[None, :]), others, 0.0), 0)
    saved = tl.where(is_low, saved_low[None, :], saved)
    saved = tl.where(is_high, saved_high[None, :], saved)
    rest = held & (saved <= price)
    count = tl.maximum(tl.sum(rest.to(tl.float32), 0), 1.0)
    mean = tl.div_rn(tl.sum(tl.where(rest, tile, 0.0), 0), count)
    return tl.where(rest, tile, mean[None, :])
