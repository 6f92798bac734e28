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
from quantine.kernels.matrix.triton.programs.several import codes_times_several


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
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    PLANES: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    UNIT_TEXT: tl.constexpr = "",
    UNIT_CONSTRAINTS: tl.constexpr = "",
    DECODE_TEXTS: tl.constexpr = (),
    DECODE_CONSTRAINTS: tl.constexpr = "",
    MORE_TEXT: tl.constexpr = "",
    MORE_CONSTRAINTS: tl.constexpr = "",
):
    """Multiply ``BLOCK`` of a program's ``ROWS`` rows: see `few_rows`.

    ``UNIT`` instructions are for one row of activations, ``PAIR`` and ``MORE`` for several.
    """
    blocks: tl.constexpr = ROWS // BLOCK
    program, own = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    first, last = 0, 0
    if bounds is not None:
        # Asked for first, so that they are there when the entries are read at the end.
        first, last = tl.load(bounds + program), tl.load(bounds + program + 1)
    row = tl.minimum(program * ROWS + own + tl.arange(0, BLOCK), rows - 1)
    tile = program * ROWS // TILE + tl.zeros([1], tl.int32)
    units_of_group: tl.constexpr = SPAN // 32 if SPAN >= 32 else 1
    groups: tl.constexpr = UNITS // units_of_group
    whole: tl.constexpr = UNITS % WIDTH == 0
    totals = ()
    for m in tl.static_range(BATCH):
        totals = totals + (tl.zeros([BLOCK], tl.float32),)
    # A loop, not unrolled: else the compiler would hold what all of its turns read at once.
    for start in range(0, UNITS, WIDTH):
        unit = start + tl.arange(0, WIDTH)
        group = start // units_of_group + tl.arange(0, WIDTH // units_of_group)
        taken = take_words(words, row, unit, UNITS, BITS, whole)
        if BATCH == 1:
            pairs = take_pairs(x, unit, UNITS, BLOCK, whole)
            low, high = codes_times(taken, pairs, BITS, UNIT_TEXT, UNIT_CONSTRAINTS)
            products = ((low, high),)
        else:
            products = codes_times_several(
                taken,
                x,
                unit,
                16 * UNITS,
                UNITS,
                BATCH,
                BLOCK,
                whole,
                BITS,
                DECODE_TEXTS,
                DECODE_CONSTRAINTS,
                MORE_TEXT,
                MORE_CONSTRAINTS,
            )
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
            more = ()
            for m in tl.static_range(BATCH):
                part = products[m][plane]
                if PLANES == 1:
                    part += products[m][1]
                if units_of_group > 1:
                    part = tl.reshape(part, [BLOCK, WIDTH // units_of_group, units_of_group])
                    part = tl.sum(part, 2)
                if ZERO_BITS != 0:
                    at = sums + (m * PLANES + plane) * groups + group
                    part -= zero * tl.load(at, mask=group < groups, other=0.0)[None, :]
                more = more + (totals[m] + tl.sum(part * scale, 1),)
            totals = more
    if bounds is not None:
        added = outliers_times(
            entry_words, entry_rows, first, last, halves, own, 32 * UNITS, BATCH, BLOCK, CHUNK
        )
    for m in tl.static_range(BATCH):
        total = totals[m]
        if bounds is not None:
            total += added[m]
        total *= tl.load(factors + m) * multiplier
        store_rows(result + m * rows, total, program * ROWS + own, rows, BLOCK)
