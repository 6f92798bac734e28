"""A block of columns on a GPU: fits, rounding, outlier tests and feedback, rows in parallel."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.columns.triton.programs.rounding import rounded
from quantine.kernels.fit.triton.programs.grids import SMALLEST_DIVISOR
from quantine.kernels.fit.triton.programs.group import fit_group, lines_of


# Known divisors of rows would make threads hold four of them, and move them between threads.
@triton.jit(do_not_specialize=["start", "stop", "rows", "inputs", "runs"])
def round_block(
    weights,
    upper,
    scales,
    zeros,
    groups,
    codes,
    errors,
    kept,
    spread,
    scale_values,
    scale_codes,
    scale_step,
    scale_zero,
    zero_values,
    zero_codes,
    zero_step,
    zero_zero,
    misfits,
    price,
    start,
    stop,
    rows,
    inputs,
    runs,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    FIT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RUNS: tl.constexpr,
    SPAN: tl.constexpr,
    RUN: tl.constexpr,
):
    """Round the columns from ``start`` to ``stop``: `quantine.kernels.columns.triton.columns`."""
    program = tl.program_id(0)
    row, there = lines_of(program, rows, RUNS, SPAN, RUN)
    run = program * RUNS + tl.arange(0, RUNS)
    column = tl.arange(0, WIDTH)
    scale_level = (scale_values, scale_codes, scale_step, scale_zero)
    zero_level = (zero_values, zero_codes, zero_step, zero_zero)
    for begin in range(start, stop, PART):
        count = tl.minimum(stop - begin, PART)
        held = column < count
        at = (begin + column).to(tl.int64)[:, None] * rows + row[None, :]
        inside = held[:, None] & there[None, :]
        tile = tl.load(weights + at, mask=inside, other=0.0)
        for number in range(start, begin):
            j = tl.cast(number, tl.int64)
            error = tl.load(errors + j * rows + row, mask=there, other=0.0)
            share = tl.load(upper + j * inputs + begin + column, mask=held, other=0.0)
            tile -= share[:, None] * error[None, :]
        if FIT is not None and not OUTPUTS:
            d = tl.load(spread + begin + column, mask=held, other=1.0)
            group = tl.cast(begin // PART, tl.int64)
            scale, zero = fit_group(
                tile,
                held[:, None],
                tl.div_rn(1.0, d * d)[:, None],
                price,
                there,
                group * rows + row,
                group * runs + run,
                run < runs,
                scale_level,
                zero_level,
                misfits,
                FIT,
                RUNS,
                SPAN,
            )
        for number in range(count):
            j = tl.cast(begin + number, tl.int64)
            # A register has no number at run time: the column is what others leave if they are 0.
            w = tl.sum(tl.where((column == number)[:, None], tile, 0.0), 0)
            if FIT is None:
                grid = tl.load(groups + j) * rows + row
                scale = tl.load(scales + grid, mask=there, other=1.0)
                scale = tl.maximum(scale, SMALLEST_DIVISOR)
                zero = tl.load(zeros + grid, mask=there, other=0.0)
            elif OUTPUTS:
                d = tl.load(spread + j)
                scale, zero = fit_group(
                    tl.trans(tl.reshape(w, [RUNS, SPAN])),
                    (tl.arange(0, SPAN) < RUN)[:, None],
                    tl.div_rn(tl.full([1, 1], 1.0, tl.float32), d * d),
                    price,
                    run < runs,
                    j * runs + run,
                    j * runs + run,
                    run < runs,
                    scale_level,
                    zero_level,
                    misfits,
                    FIT,
                    RUNS,
                    1,
                )
                scale = tl.reshape(tl.broadcast_to(scale[:, None], [RUNS, SPAN]), [RUNS * SPAN])
                zero = tl.reshape(tl.broadcast_to(zero[:, None], [RUNS, SPAN]), [RUNS * SPAN])
            diagonal = tl.load(upper + j * inputs + j)
            keeps: tl.constexpr = kept is not None
            code, keep, _, error = rounded(w, scale, zero, diagonal, price, keeps, BITS)
            place = j * rows + row
            if kept is not None:
                tl.store(kept + place, keep.to(tl.int8), mask=there)
            tl.store(codes + place, code.to(tl.uint8), mask=there)
            tl.store(errors + place, error, mask=there)
            later = (column > number) & held
            share = tl.load(upper + j * inputs + begin + column, mask=later, other=0.0)
            tile -= share[:, None] * error[None, :]
        tl.store(weights + at, tile, mask=inside)
        tl.debug_barrier()  # the next part reads errors that other threads have written
