"""One column on a GPU whose rows make up for each other: runs of rows in parallel."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.columns.triton.programs.rounding import rounded
from quantine.kernels.fit.triton.programs.grids import SMALLEST_DIVISOR


@triton.jit(do_not_specialize=["column", "rows", "inputs", "run"])
def round_coupled(
    weights,
    upper,
    scales,
    zeros,
    groups,
    codes,
    errors,
    kept,
    coupling,
    price,
    column,
    rows,
    inputs,
    run,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Round a column, a program for each run of rows, from the last row to the first.

    All rows of the run are rounded again in each step, which costs no more than one: only the row
    whose turn it is asks those before it, and what it is asked is complete by then.

    Args:
        WIDTH: a power of two, at least ``run``.
    """
    begin = tl.cast(tl.program_id(0), tl.int64) * run
    place = tl.arange(0, WIDTH)
    count = tl.minimum(run, rows - begin).to(tl.int32)
    there = place < count
    row, j = begin + place, tl.cast(column, tl.int64)
    grid = tl.load(groups + j) * rows + row
    scale = tl.maximum(tl.load(scales + grid, mask=there, other=1.0), SMALLEST_DIVISOR)
    zero = tl.load(zeros + grid, mask=there, other=0.0)
    before = tl.load(weights + j * rows + row, mask=there, other=0.0)
    diagonal = tl.load(upper + j * inputs + j)
    wanted = before
    for step in range(count):
        turn = count - 1 - step
        _, _, value, _ = rounded(wanted, scale, zero, diagonal, price, kept is not None, BITS)
        lost = tl.sum(tl.where(place == turn, before - value, 0.0))
        asks = tl.load(coupling + (begin + turn) * run + place, mask=place < turn, other=0.0)
        wanted += asks * lost
    code, keep, value, _ = rounded(wanted, scale, zero, diagonal, price, kept is not None, BITS)
    at = j * rows + row
    tl.store(weights + at, wanted, mask=there)
    tl.store(codes + at, code.to(tl.uint8), mask=there)
    tl.store(errors + at, tl.div_rn(before - value, diagonal), mask=there)
    if kept is not None:
        tl.store(kept + at, keep.to(tl.int8), mask=there)
