"""One row of activations times a matrix whose groups run along outputs."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.matrix.triton.programs.parts import (
    codes_times,
    high_half,
    low_half,
    outliers_times,
    take_pairs,
    take_words,
    two_halves,
)


@triton.jit
def _pairs_times(
    one,
    other,
    SUM_TEXT: tl.constexpr,
    SUM_CONSTRAINTS: tl.constexpr,
):
    """Sums of products of 16 words of two float16 with 16 others, as float32."""
    if SUM_TEXT != "":
        low, high = tl.inline_asm_elementwise(
            SUM_TEXT,
            SUM_CONSTRAINTS,
            one + other,
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
        total = low + high
    else:
        total = tl.zeros(one[0].shape, tl.float32)
        for pair in tl.static_range(16):
            total += low_half(one[pair]).to(tl.float32) * low_half(other[pair]).to(tl.float32)
            total += high_half(one[pair]).to(tl.float32) * high_half(other[pair]).to(tl.float32)
    return total


@triton.jit
def _side_by_side(parts, COUNT: tl.constexpr, LENGTH: tl.constexpr):
    """``COUNT`` (1, 2 or 4) tensors ``[LENGTH]`` one after the other, ``[COUNT * LENGTH]``.

    Nothing moves between threads, so that results are brought into the order of memory at once:
    each time takes a barrier.
    """
    if COUNT == 4:
        parts = (tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    if COUNT >= 2:
        parts = (tl.join(parts[0], parts[1]),)
    joined = tl.reshape(parts[0], [LENGTH, COUNT])
    return tl.reshape(tl.permute(joined, 1, 0), [COUNT * LENGTH])


@triton.jit
def multiply_column_groups(
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    SUM_TEXT: tl.constexpr,
    SUM_CONSTRAINTS: tl.constexpr,
    PAIR_TEXT: tl.constexpr,
    PAIR_CONSTRAINTS: tl.constexpr,
    UNIT_TEXT: tl.constexpr,
    UNIT_CONSTRAINTS: tl.constexpr,
):
    """Multiply ``ROWS`` rows: see `quantine.kernels.matrix.triton.few_rows`."""
    program = tl.program_id(0)
    first, last = 0, 0
    if bounds is not None:
        first, last = tl.load(bounds + program), tl.load(bounds + program + 1)
    group = program * ROWS // SIZE
    factor = tl.load(group_factors + group)
    line = group * 16 * UNITS
    # All rows of the program are of one group: activations are multiplied by its scales once.
    totals = ()
    for block in tl.static_range(ROWS // BLOCK):
        totals = totals + (tl.zeros([BLOCK], tl.float32),)
    taken_off = tl.zeros([BLOCK], tl.float32)
    # A loop, not unrolled: else the compiler would hold what all of its turns read at once.
    for start in range(0, UNITS, WIDTH):
        unit = start + tl.arange(0, WIDTH)
        met = take_pairs(x, unit, UNITS, BLOCK, UNITS % WIDTH == 0)
        scale = take_pairs(scales + line, unit, UNITS, BLOCK, UNITS % WIDTH == 0)
        scaled = ()
        for pair in tl.static_range(16):
            if PAIR_TEXT != "":
                product = tl.inline_asm_elementwise(
                    PAIR_TEXT,
                    PAIR_CONSTRAINTS,
                    (met[pair], scale[pair]),
                    dtype=tl.int32,
                    is_pure=True,
                    pack=1,
                )
            else:
                product = two_halves(
                    low_half(met[pair]) * low_half(scale[pair]),
                    high_half(met[pair]) * high_half(scale[pair]),
                )
            scaled = scaled + (product,)
        if zeros is not None:
            zero = take_pairs(zeros + line, unit, UNITS, BLOCK, UNITS % WIDTH == 0)
            taken_off += tl.sum(_pairs_times(zero, scaled, SUM_TEXT, SUM_CONSTRAINTS), 1)
        more = ()
        for block in tl.static_range(ROWS // BLOCK):
            number = program * ROWS + block * BLOCK + tl.arange(0, BLOCK)
            row = tl.minimum(number, rows - 1)
            taken = take_words(words, row, unit, UNITS, BITS, UNITS % WIDTH == 0)
            low, high = codes_times(taken, scaled, BITS, UNIT_TEXT, UNIT_CONSTRAINTS)
            more = more + (totals[block] + tl.sum(low + high, 1),)
        totals = more
    finished = ()
    for block in tl.static_range(ROWS // BLOCK):
        finished = finished + (totals[block] - taken_off,)
    total = _side_by_side(finished, ROWS // BLOCK, BLOCK) * factor
    if bounds is not None:
        added = outliers_times(
            entry_words, entry_rows, first, last, halves, 0, 32 * UNITS, 1, ROWS, CHUNK
        )
        total += added[0]
    total *= tl.load(factors) * multiplier
    number = program * ROWS + tl.arange(0, ROWS)
    tl.store(result + number, total.to(result.dtype.element_ty), mask=number < rows)
