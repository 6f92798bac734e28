"""Rounding of a run of columns, rows in parallel, the run in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_run(
    weights,
    upper,
    scales,
    zeros,
    groups,
    codes,
    errors,
    kept,
    price,
    start,
    count,
    rows,
    inputs,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Round ``count`` columns from ``start`` on, see `quantine.kernels.columns.triton.columns`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    column = tl.arange(0, WIDTH)
    held = column < count
    line = (start + column).to(tl.int64) * rows
    tile = tl.load(
        weights + line[None, :] + row[:, None], mask=there[:, None] & held[None, :], other=0.0
    )
    for number in range(count):
        j = start + number
        # A register has no number at run time: the column is what is left when the others are zero.
        w = tl.sum(tl.where((column == number)[None, :], tile, 0.0), 1)
        group = tl.load(groups + j)
        scale = tl.load(scales + group * rows + row, mask=there, other=1.0)
        scale = tl.maximum(scale, SMALLEST)
        zero = tl.load(zeros + group * rows + row, mask=there, other=0.0)
        diagonal = tl.load(upper + j.to(tl.int64) * inputs + j)
        place = tl.minimum(tl.maximum(tl.div_rn(w, scale) + zero, 0.0), 2.0**BITS - 1)
        # Adding 1.5 * 2**23 leaves no bits for fractions: the sum is rounded, ties to even.
        code = (place + 12582912.0) - 12582912.0
        error = tl.div_rn(w - scale * (code - zero), diagonal)
        at = j.to(tl.int64) * rows + row
        if kept is not None:
            lost = tl.div_rn(w - w.to(tl.float16).to(tl.float32), diagonal)
            keep = (error * error > price) & (tl.abs(lost) < tl.abs(error))
            error = tl.where(keep, lost, error)
            tl.store(kept + at, keep.to(tl.int8), mask=there)
        tl.store(codes + at, code.to(tl.uint8), mask=there)
        tl.store(errors + at, error, mask=there)
        later = (column > number) & held
        share = tl.load(upper + j.to(tl.int64) * inputs + start + column, mask=later, other=0.0)
        tile -= error[:, None] * share[None, :]
    tl.store(weights + line[None, :] + row[:, None], tile, mask=there[:, None] & held[None, :])
