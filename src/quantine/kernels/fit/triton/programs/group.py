"""The grid of a group, range to second level, for a tile in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.fit.triton.programs.grids import (
    FIRST_INFINITE,
    LARGEST_HALF,
    SMALLEST_DIVISOR,
    SMALLEST_SCALE,
    cheapest_range,
    report,
    to_half,
    whole_scale,
    without_outliers,
)
from quantine.kernels.fit.triton.programs.second_level import put_on_second, refined


@triton.jit
def lines_of(program, count, RUNS: tl.constexpr, SPAN: tl.constexpr, RUN: tl.constexpr):
    """The lines of a program, and whether they are there: both ``[RUNS * SPAN]``.

    Of ``count`` lines a program has ``RUNS`` runs of ``RUN``, each filled up to ``SPAN`` places.
    """
    place = tl.arange(0, RUNS * SPAN)
    line = (program * RUNS + place // SPAN) * RUN + place % SPAN
    return line, (place % SPAN < RUN) & (line < count)


@triton.jit
def fit_group(
    tile,
    held,
    importance,
    price,
    there,
    at,
    at_runs,
    runs_there,
    scale_level,
    zero_level,
    misfits,
    FIT: tl.constexpr,
    RUNS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Fit a grid to each line of a tile and store it: `fit_groups_reference`.

    Args:
        tile: ``[n, lines]`` float32, a group's weights, zero beyond them.
        held: ``[n, 1]``, whether a place is a weight.
        importance: ``1 / d**2``, ``[n, 1]`` or ``[1, lines]``.
        price: threshold of outliers.
        there: ``[lines]``, whether there is such a line.
        at, at_runs, runs_there: places of the lines and of their runs among all statistics.
        scale_level, zero_level: pointers to values, codes, steps and zero points.
        misfits: pointer to what `report` notes.
        FIT: a `quantine.kernels.fit.triton.request.Request`.

    Returns:
        Scale and zero point ``[lines]``, scales positive.
    """
    BITS: tl.constexpr = FIT.bits
    SYM: tl.constexpr = FIT.sym
    FARTHEST: tl.constexpr = FIT.farthest
    CLIP: tl.constexpr = FIT.clip
    needed = tl.sum(tile * 0.0, 0)  # not a number if a weight is not finite
    if FARTHEST is None:
        low = tl.min(tl.where(held, tile, float("inf")), 0)
        high = tl.max(tl.where(held, tile, float("-inf")), 0)
        needed += whole_scale(low, high, BITS, SYM)
    report(misfits, 0, needed, (needed <= LARGEST_HALF) | ~there)
    inliers = tile
    if FIT.look_ahead:
        inliers = without_outliers(tile, held, importance, price, BITS, SYM, FARTHEST)
        if CLIP != "hessian":
            tile = inliers
    scale, zero = cheapest_range(
        tile, inliers, held, importance, price, BITS, SYM, FARTHEST, CLIP, FIT.shrinks
    )
    one, none = tl.zeros_like(scale) + 1.0, tl.zeros_like(scale)
    if FIT.scale_top > 0:
        scale_code, scale_step, scale_zero = put_on_second(
            scale,
            there,
            at_runs,
            runs_there,
            scale_level,
            misfits,
            FIT.scale_bits,
            FIT.given,
            RUNS,
            SPAN,
        )
    else:
        report(misfits, 0, scale, (scale <= LARGEST_HALF) | ~there)
        scale_code, scale_step, scale_zero = to_half(tl.maximum(scale, SMALLEST_SCALE)), one, none
    if FIT.zero_coded:
        zero_code, zero_step, zero_zero = put_on_second(
            zero,
            there,
            at_runs,
            runs_there,
            zero_level,
            misfits,
            FIT.zero_bits,
            FIT.given,
            RUNS,
            SPAN,
        )
    else:
        zero_code, zero_step, zero_zero = zero, one, none
        if FARTHEST is not None:
            report(misfits, 1, tl.abs(zero), (tl.abs(zero) < FIRST_INFINITE) | ~there)
            zero_code = to_half(zero)
    if FIT.refines:
        scale_code, zero_code = refined(
            tile,
            held,
            importance,
            price,
            scale_code,
            scale_step,
            scale_zero,
            zero_code,
            zero_step,
            zero_zero,
            BITS,
            CLIP,
            FIT.scale_top,
            FIT.zero_top,
        )
    scale, zero = (scale_code - scale_zero) * scale_step, (zero_code - zero_zero) * zero_step
    if FIT.scale_top > 0:
        tl.store(scale_level[1] + at, scale_code.to(tl.uint8), mask=there)
    if FIT.zero_coded:
        tl.store(zero_level[1] + at, zero_code.to(tl.uint8), mask=there)
    tl.store(scale_level[0] + at, scale, mask=there)
    tl.store(zero_level[0] + at, zero, mask=there)
    return tl.maximum(scale, SMALLEST_DIVISOR), zero
