"""Many rows of activations times a packed matrix, by tensor cores; and decoding it."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.matrix.triton.programs.parts import low_half
from quantine.kernels.matrix.triton.programs.weights import take_weights


@triton.jit
def multiply_tiles(
    words,
    fields,
    scale_grids,
    zero_grids,
    row_factors,
    entry_words,
    entry_rows,
    bounds,
    x,
    factors,
    batch,
    multiplier,
    result,
    rows,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ALONG_OUTPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    PLANES: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    UNIT_TEXT: tl.constexpr,
    UNIT_CONSTRAINTS: tl.constexpr,
):
    """Compute a tile of the result: see `quantine.kernels.matrix.triton.many_rows`."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(number, rows - 1)
    taker = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    there = taker < batch
    line = taker.to(tl.int64) * (32 * UNITS)
    factor = tl.load(row_factors + (row // SIZE if ALONG_OUTPUTS else row))
    total = tl.zeros([ROWS, BATCH], tl.float32)
    for start in range(0, UNITS, WIDTH):
        unit = start + tl.arange(0, WIDTH)
        weights = take_weights(
            words,
            fields,
            scale_grids,
            zero_grids,
            factor,
            row,
            rows,
            unit,
            BITS,
            UNITS,
            ROWS,
            WIDTH,
            ALONG_OUTPUTS,
            SIZE,
            SPAN,
            PLANES,
            SCALE_BITS,
            ZERO_BITS,
            UNIT_TEXT,
            UNIT_CONSTRAINTS,
        )
        at = start * 32 + tl.arange(0, WIDTH * 32)
        met = tl.load(x + at[:, None] + line[None, :], mask=there[None, :], other=0.0)
        total = tl.dot(weights, met, total)
    total *= factor[:, None]
    if bounds is not None:
        for part in range(ROWS // PROGRAM):
            program = tl.program_id(0) * (ROWS // PROGRAM) + part
            held = program * PROGRAM < rows
            first = tl.load(bounds + program, mask=held, other=0)
            last = tl.load(bounds + program + 1, mask=held, other=0)
            for start in range(first, last, CHUNK):
                entry_number = start + tl.arange(0, CHUNK)
                kept = entry_number < last
                entry = tl.load(entry_words + entry_number, mask=kept, other=0)
                of_row = tl.load(entry_rows + entry_number, mask=kept, other=0).to(tl.int32)
                pair = ((entry >> 16) & 0xFFFF) // 2
                at = pair % UNITS * 32 + ((entry >> 16) & 1) * 16 + pair // UNITS
                seen = kept[:, None] & there[None, :]
                met = tl.load(x + at[:, None] + line[None, :], mask=seen, other=0.0)
                mine = (part * PROGRAM + of_row)[None, :] == tl.arange(0, ROWS)[:, None]
                added = tl.where(mine & kept[None, :], low_half(entry)[None, :], 0.0)
                total = tl.dot(added.to(tl.float16), met, total)
    total *= tl.load(factors + taker, mask=there, other=0.0)[None, :] * multiplier
    at = result + taker[None, :].to(tl.int64) * rows + number[:, None]
    tl.store(at, total.to(result.dtype.element_ty), mask=(number < rows)[:, None] & there[None, :])


@triton.jit
def decode_tiles(
    words,
    fields,
    scale_grids,
    zero_grids,
    row_factors,
    multiplier,
    source,
    result,
    rows,
    first,
    stop,
    columns,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALONG_OUTPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    PLANES: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    UNIT_TEXT: tl.constexpr,
    UNIT_CONSTRAINTS: tl.constexpr,
):
    """Decode a tile of the matrix: see `quantine.kernels.matrix.triton.many_rows.decode`."""
    number = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(number, stop - 1)
    unit = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    factor = tl.load(row_factors + (row // SIZE if ALONG_OUTPUTS else row))
    weights = take_weights(
        words,
        fields,
        scale_grids,
        zero_grids,
        factor,
        row,
        rows,
        unit,
        BITS,
        UNITS,
        ROWS,
        WIDTH,
        ALONG_OUTPUTS,
        SIZE,
        SPAN,
        PLANES,
        SCALE_BITS,
        ZERO_BITS,
        UNIT_TEXT,
        UNIT_CONSTRAINTS,
    )
    place = tl.program_id(1) * WIDTH * 32 + tl.arange(0, WIDTH * 32)
    inside = place < columns
    if source is not None:
        place = tl.load(source + place, mask=inside, other=0)
    at = result + (number - first).to(tl.int64)[:, None] * columns + place[None, :]
    value = (weights.to(tl.float32) * factor[:, None] * multiplier).to(result.dtype.element_ty)
    tl.store(at, value, mask=(number < stop)[:, None] & inside[None, :])
