"""Few rows of rounded activations times a packed matrix, in integers."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.integer.triton.programs.parts import unit_times
from quantine.kernels.matrix.triton.programs.parts import store_rows, take_words


@triton.jit
def products_of(
    m,
    taken,
    unit,
    scale,
    zero,
    quads,
    sums,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COMMON: tl.constexpr,
    TEXT: tl.constexpr,
):
    """What the words ``taken`` of some units add to the results of row ``m`` of activations."""
    runs: tl.constexpr = WIDTH // COMMON
    met = ()
    for quad in tl.static_range(8):
        at = quads + (m * 8 + quad) * UNITS + unit
        x = tl.load(at) if UNITS % WIDTH == 0 else tl.load(at, mask=unit < UNITS, other=0)
        met = met + (tl.broadcast_to(x[None, :], ROWS, WIDTH),)
    part = unit_times(taken, met, BITS, TEXT)
    added = tl.load(sums + m * UNITS + unit, mask=unit < UNITS, other=0.0)
    if COMMON > 1:
        part = tl.sum(tl.reshape(part, [ROWS, runs, COMMON]), 2)
        added = tl.sum(tl.reshape(added, [runs, COMMON]), 1)
    return tl.sum((part.to(tl.float32) - zero * added[None, :]) * scale, 1)


@triton.jit
def outliers_of(
    m,
    number,
    program,
    entry_values,
    entry_places,
    entry_rows,
    bounds,
    codes,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What the program's outliers add to the results of row ``m`` of activations."""
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    last = tl.load(bounds + program + 1)
    for start in range(tl.load(bounds + program), last, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        there = entry < last
        place = tl.load(entry_places + entry, mask=there, other=0)
        byte = ((m * 8 + place % 32 // 4) * UNITS + place // 32) * 4 + place % 4
        x = tl.load(codes + byte, mask=there, other=0).to(tl.float32)
        added = x * tl.load(entry_values + entry, mask=there, other=0.0)
        mine = tl.load(entry_rows + entry, mask=there, other=-1)[None, :] == number[:, None]
        total += tl.where(mine, added[None, :], 0.0)
    return tl.sum(total, 1)


@triton.jit
def multiply_few(
    words,
    weight_scales,
    weight_zeros,
    groups_of,
    base,
    entry_values,
    entry_places,
    entry_rows,
    bounds,
    steps,
    quads,
    codes,
    sums,
    scales,
    shifts,
    result,
    rows,
    groups,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    BATCH: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COMMON: tl.constexpr,
    CHUNK: tl.constexpr,
    TEXT: tl.constexpr,
):
    """Multiply ``ROWS`` rows: see `quantine.kernels.integer.triton.few_rows`."""
    program = tl.program_id(0)
    number = program * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(number, rows - 1)
    # A loop, not unrolled: else the compiler would hold what all of its turns read at once.
    for m in range(0, BATCH, EACH):
        totals = ()
        for n in tl.static_range(EACH):
            totals = totals + (tl.zeros([ROWS], tl.float32),)
        for start in range(0, UNITS, WIDTH):
            unit = start + tl.arange(0, WIDTH)
            taken = take_words(words, row, unit, UNITS, BITS, UNITS % WIDTH == 0)
            first = start + tl.arange(0, WIDTH // COMMON) * COMMON
            held = first < UNITS
            group = tl.load(groups_of + first, mask=held, other=0)
            at = row[:, None] * groups + group[None, :]
            zero = 2.0 ** (BITS - 1)
            if weight_zeros is not None:
                zero = tl.load(weight_zeros + at).to(tl.float32)
            scale = tl.load(weight_scales + at).to(tl.float32)
            if steps is not None:
                scale *= tl.load(steps + first, mask=held, other=0.0)[None, :]
            sums_so_far = ()
            for n in tl.static_range(EACH):
                more = products_of(
                    tl.minimum(m + n, BATCH - 1),
                    taken,
                    unit,
                    scale,
                    zero,
                    quads,
                    sums,
                    BITS,
                    UNITS,
                    ROWS,
                    WIDTH,
                    COMMON,
                    TEXT,
                )
                sums_so_far = sums_so_far + (totals[n] + more,)
            totals = sums_so_far
        for n in tl.static_range(EACH):
            total, line = totals[n], tl.minimum(m + n, BATCH - 1)
            if bounds is not None:
                total += outliers_of(
                    line,
                    number,
                    program,
                    entry_values,
                    entry_places,
                    entry_rows,
                    bounds,
                    codes,
                    UNITS,
                    ROWS,
                    CHUNK,
                )
            total -= tl.load(shifts + line) * tl.load(base + row)
            total *= tl.load(scales + line)
            store_rows(result + line * rows, total, program * ROWS, rows, ROWS)
