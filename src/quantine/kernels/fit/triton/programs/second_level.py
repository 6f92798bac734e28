"""Scales and zero points on second grids (SpQR, arXiv 2306.03078, section 4.2), in registers.

A program's lines are some runs of ``SPAN`` places; the lines of a run share a second grid.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.fit.triton.programs.grids import (
    FIRST_INFINITE,
    SMALLEST_DIVISOR,
    SMALLEST_SCALE,
    cost_of,
    report,
    to_half,
)
from quantine.kernels.programs.whole_numbers import nearest_code


@triton.jit
def fit_second(values, there, misfits, BITS: tl.constexpr, RUNS: tl.constexpr, SPAN: tl.constexpr):
    """Step and zero point ``[RUNS]``: `quantine.core.fit_range.fit_statistic`."""
    low = tl.min(tl.reshape(tl.where(there, values, float("inf")), [RUNS, SPAN]), 1)
    high = tl.max(tl.reshape(tl.where(there, values, float("-inf")), [RUNS, SPAN]), 1)
    low, high = tl.where(low <= high, low, 0.0), tl.where(low <= high, high, 0.0)
    reach = tl.maximum(tl.abs(low), tl.abs(high))
    least = tl.maximum(reach * 2.0**-15, SMALLEST_SCALE)
    wanted = tl.maximum(tl.div_rn(high - low, 2.0**BITS - 1), least)
    largest = tl.maximum(wanted, tl.abs(low))
    report(misfits, 1, largest, largest < FIRST_INFINITE)
    above = tl.ceil(wanted * 2.0**24) * SMALLEST_SCALE
    step = tl.where(wanted < 2.0**-14, above, to_half(wanted))
    single = (high - low <= reach * 2.0**-10) & (reach >= SMALLEST_SCALE)
    zero = tl.where(single, -1.0, to_half(tl.div_rn(-low, step)))
    return tl.where(single, to_half(low), step), zero


@triton.jit
def put_on_second(
    values,
    there,
    at_runs,
    runs_there,
    level,
    misfits,
    BITS: tl.constexpr,
    GIVEN: tl.constexpr,
    RUNS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Codes of ``values`` ``[lines]`` on second grids, and the grids' steps and zero points.

    Second grids are fitted and stored, or loaded where they are ``GIVEN``.

    Returns:
        Three tensors ``[lines]``: a value is ``(code - zero) * step``.
    """
    if GIVEN:
        step = tl.load(level[2] + at_runs, mask=runs_there, other=1.0)
        zero = tl.load(level[3] + at_runs, mask=runs_there, other=0.0)
    else:
        step, zero = fit_second(values, there, misfits, BITS, RUNS, SPAN)
        tl.store(level[2] + at_runs, step, mask=runs_there)
        tl.store(level[3] + at_runs, zero, mask=runs_there)
    step = tl.reshape(tl.broadcast_to(step[:, None], [RUNS, SPAN]), [RUNS * SPAN])
    zero = tl.reshape(tl.broadcast_to(zero[:, None], [RUNS, SPAN]), [RUNS * SPAN])
    return nearest_code(tl.div_rn(values, step) + zero, BITS), step, zero


@triton.jit
def refined(
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
    BITS: tl.constexpr,
    CLIP: tl.constexpr,
    SCALE_TOP: tl.constexpr,
    ZERO_TOP: tl.constexpr,
):
    """The neighbouring codes of scale and zero point with the least cost, ``[lines]`` each.

    ``SCALE_TOP`` and ``ZERO_TOP`` are the largest codes; 0 where there is no choice.
    """
    turns: tl.constexpr = 3 if ZERO_TOP > 0 else 1
    best_scale, best_zero = scale_code, zero_code
    least = tl.zeros_like(scale_code) + float("inf")
    for turn in range((3 if SCALE_TOP > 0 else 1) * turns):
        i, k = turn // turns, turn % turns
        scale_tried, zero_tried = scale_code, zero_code
        # (3 i**2 - 5 i) / 2 is 0, -1, 1: the present codes come first.
        if SCALE_TOP > 0:
            scale_tried += (3 * i * i - 5 * i) // 2
            scale_tried = tl.minimum(tl.maximum(scale_tried, 0.0), SCALE_TOP)
        if ZERO_TOP > 0:
            zero_tried += (3 * k * k - 5 * k) // 2
            zero_tried = tl.minimum(tl.maximum(zero_tried, 0.0), ZERO_TOP)
        scale = tl.maximum((scale_tried - scale_zero) * scale_step, SMALLEST_DIVISOR)
        zero = (zero_tried - zero_zero) * zero_step
        cost = cost_of(tile, held, importance, price, scale, zero, BITS, CLIP == "mse")
        better = cost < least
        least = tl.where(better, cost, least)
        best_scale = tl.where(better, scale_tried, best_scale)
        best_zero = tl.where(better, zero_tried, best_zero)
    return best_scale, best_zero
