"""Two to four rows of activations times a matrix whose groups run along outputs."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.matrix.triton.programs.parts import (
    outliers_times,
    store_rows,
    take_pair,
    take_words,
)
from quantine.kernels.matrix.triton.programs.several import (
    as_floats,
    decode_pair,
    no_sums,
    of_words,
    pair_times,
)


@triton.jit
def multiply_column_groups_several(
    words,
    scales,
    zeros,
    group_factors,
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
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    DECODE_TEXTS: tl.constexpr,
    DECODE_CONSTRAINTS: tl.constexpr,
    MORE_TEXT: tl.constexpr,
    MORE_CONSTRAINTS: tl.constexpr,
):
    """Multiply ``BLOCK`` of a program's ``ROWS`` rows: see `few_rows`.

    A program has fewer rows of the matrix than with one row of activations, as registers hold sums
    for each of them and each row of activations.
    """
    blocks: tl.constexpr = ROWS // BLOCK
    program, own = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    first, last = 0, 0
    if bounds is not None:
        first, last = tl.load(bounds + program), tl.load(bounds + program + 1)
    row = tl.minimum(program * ROWS + own + tl.arange(0, BLOCK), rows - 1)
    group = program * ROWS // SIZE
    factor = tl.load(group_factors + group)
    line = group * 16 * UNITS
    whole: tl.constexpr = UNITS % WIDTH == 0
    totals = ()
    for m in tl.static_range(BATCH):
        totals = totals + (tl.zeros([BLOCK], tl.float32),)
    # A loop, not unrolled: else the compiler would hold what all of its turns read at once.
    for start in range(0, UNITS, WIDTH):
        unit = start + tl.arange(0, WIDTH)
        taken = take_words(words, row, unit, UNITS, BITS, whole)
        nothing = no_sums(taken[0], MORE_TEXT)
        sums, taken_off = (), ()
        for m in tl.static_range(BATCH):
            sums = sums + (nothing,)
            if zeros is not None:
                taken_off = taken_off + (nothing,)
        for pair in tl.static_range(16):
            code = decode_pair(taken, pair, BITS, DECODE_TEXTS, DECODE_CONSTRAINTS)
            scale = take_pair(scales + line, pair, unit, UNITS, BLOCK, whole)
            scale = of_words(scale, MORE_TEXT)
            if zeros is not None:
                zero = take_pair(zeros + line, pair, unit, UNITS, BLOCK, whole)
                zero = of_words(zero, MORE_TEXT)
            more, more_off = (), ()
            for m in tl.static_range(BATCH):
                met = take_pair(x + m * 16 * UNITS, pair, unit, UNITS, BLOCK, whole)
                met = of_words(met, MORE_TEXT)
                met = pair_times(met, scale, nothing, MORE_TEXT, MORE_CONSTRAINTS)
                more = more + (pair_times(code, met, sums[m], MORE_TEXT, MORE_CONSTRAINTS),)
                if zeros is not None:
                    less = pair_times(zero, met, taken_off[m], MORE_TEXT, MORE_CONSTRAINTS)
                    more_off = more_off + (less,)
            sums, taken_off = more, more_off
        more = ()
        for m in tl.static_range(BATCH):
            low, high = as_floats(sums[m], MORE_TEXT)
            part = low + high
            if zeros is not None:
                low, high = as_floats(taken_off[m], MORE_TEXT)
                part -= low + high
            more = more + (totals[m] + tl.sum(part, 1),)
        totals = more
    if bounds is not None:
        added = outliers_times(
            entry_words, entry_rows, first, last, halves, own, 32 * UNITS, BATCH, BLOCK, CHUNK
        )
    for m in tl.static_range(BATCH):
        total = totals[m] * factor
        if bounds is not None:
            total += added[m]
        total *= tl.load(factors + m) * multiplier
        store_rows(result + m * rows, total, program * ROWS + own, rows, BLOCK)
