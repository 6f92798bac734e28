"""Few rows of rounded activations times a packed matrix, in integers."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.integer.triton.programs.parts import unit_times
from quantine.kernels.matrix.triton.programs.parts import take_words


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
    runs: tl.constexpr = WIDTH // COMMON
    whole: tl.constexpr = UNITS % WIDTH == 0
    for m in range(BATCH):
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, UNITS, WIDTH):
            unit = start + tl.arange(0, WIDTH)
            taken = take_words(words, row, unit, UNITS, BITS, whole)
            met = ()
            for quad in tl.static_range(8):
                at = quads + (m * 8 + quad) * UNITS + unit
                x = tl.load(at) if whole else tl.load(at, mask=unit < UNITS, other=0)
                met = met + (tl.broadcast_to(x[None, :], ROWS, WIDTH),)
            part = unit_times(taken, met, BITS, TEXT)
            added = tl.load(sums + m * UNITS + unit, mask=unit < UNITS, other=0.0)
            if COMMON > 1:
                part = tl.sum(tl.reshape(part, [ROWS, runs, COMMON]), 2)
                added = tl.sum(tl.reshape(added, [runs, COMMON]), 1)
            first = start + tl.arange(0, runs) * COMMON
            held = first < UNITS
            group = tl.load(groups_of + first, mask=held, other=0)
            at = row[:, None] * groups + group[None, :]
            zero = 2.0 ** (BITS - 1)
            if weight_zeros is not None:
                zero = tl.load(weight_zeros + at).to(tl.float32)
            value = part.to(tl.float32) - zero * added[None, :]
            value *= tl.load(weight_scales + at).to(tl.float32)
            if steps is not None:
                value *= tl.load(steps + first, mask=held, other=0.0)[None, :]
            total += tl.sum(value, 1)
        if bounds is not None:
            last = tl.load(bounds + program + 1)
            for start in range(tl.load(bounds + program), last, CHUNK):
                entry = start + tl.arange(0, CHUNK)
                there = entry < last
                place = tl.load(entry_places + entry, mask=there, other=0)
                byte = ((m * 8 + place % 32 // 4) * UNITS + place // 32) * 4 + place % 4
                x = tl.load(codes + byte, mask=there, other=0).to(tl.float32)
                added = x * tl.load(entry_values + entry, mask=there, other=0.0)
                mine = tl.load(entry_rows + entry, mask=there, other=-1)[None, :] == number[:, None]
                total += tl.sum(tl.where(mine, added[None, :], 0.0), 1)
        total -= tl.load(shifts + m) * tl.load(base + row)
        total *= tl.load(scales + m)
        tl.store(result + m * rows + number, total.to(result.dtype.element_ty), mask=number < rows)
