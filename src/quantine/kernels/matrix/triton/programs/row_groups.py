"""Few rows of activations times a matrix whose groups run along inputs."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.matrix.triton.programs.parts import (
    codes_times,
    outliers_times,
    store_rows,
    take_pairs,
    take_statistics,
    take_words,
)


@triton.jit
def multiply_row_groups(
    words,
    fields,
    scale_grids,
    zero_grids,
    sums,
    entry_words,
    entry_rows,
    bounds,
    x,
    halves,
    factors,
    multiplier,
    result,
    rows,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    PLANES: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    UNIT_TEXT: tl.constexpr,
    UNIT_CONSTRAINTS: tl.constexpr,
):
    """Multiply ``ROWS`` rows: see `quantine.kernels.matrix.triton.few_rows`."""
    program = tl.program_id(0)
    first, last = 0, 0
    if bounds is not None:
        # Asked for first, so that they are there when the entries are read at the end.
        first, last = tl.load(bounds + program), tl.load(bounds + program + 1)
    row = tl.minimum(program * ROWS + tl.arange(0, ROWS), rows - 1)
    tile = program * ROWS // TILE + tl.zeros([1], tl.int32)
    units_of_group: tl.constexpr = SPAN // 32 if SPAN >= 32 else 1
    groups: tl.constexpr = UNITS // units_of_group
    # Loops, not unrolled: else the compiler would hold what all of their turns read at once.
    for m in range(BATCH):
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, UNITS, WIDTH):
            unit = start + tl.arange(0, WIDTH)
            group = start // units_of_group + tl.arange(0, WIDTH // units_of_group)
            taken = take_words(words, row, unit, UNITS, BITS, UNITS % WIDTH == 0)
            pairs = take_pairs(x + m * 16 * UNITS, unit, UNITS, ROWS, UNITS % WIDTH == 0)
            low, high = codes_times(taken, pairs, BITS, UNIT_TEXT, UNIT_CONSTRAINTS)
            if PLANES == 2:
                parts = (low, high)
            else:
                both = low + high
                if units_of_group > 1:
                    both = tl.reshape(both, [ROWS, WIDTH // units_of_group, units_of_group])
                    both = tl.sum(both, 2)
                parts = (both,)
            for plane in tl.static_range(PLANES):
                scale, zero = take_statistics(
                    fields,
                    scale_grids,
                    zero_grids,
                    row,
                    rows,
                    tile,
                    plane,
                    group,
                    BITS,
                    groups,
                    PLANES,
                    SCALE_BITS,
                    ZERO_BITS,
                    4 // units_of_group,
                )
                part = parts[plane]
                if ZERO_BITS != 0:
                    at = sums + (m * PLANES + plane) * groups + group
                    part -= zero * tl.load(at, mask=group < groups, other=0.0)[None, :]
                total += tl.sum(part * scale, 1)
        if bounds is not None:
            met = halves + m * 32 * UNITS
            total += outliers_times(entry_words, entry_rows, first, last, met, ROWS, CHUNK)
        total *= tl.load(factors + m) * multiplier
        store_rows(result + m * rows, total, program * ROWS, rows, ROWS)
