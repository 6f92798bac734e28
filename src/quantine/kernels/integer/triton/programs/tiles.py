"""Many rows of rounded activations times a packed matrix, by tensor cores for bytes."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.integer.triton.programs.parts import quad_of


@triton.jit
def side_by_side(quads, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The bytes of eight quads of each unit in the order of places, ``[ROWS, 32 * WIDTH]`` int8."""
    # Each join adds the next lower bit of a quad's number, then of a byte's.
    level = quads
    for step in tl.static_range(3):
        joined = ()
        for quad in tl.static_range(4 >> step):
            joined = joined + (tl.join(level[quad], level[quad + (4 >> step)]),)
        level = joined
    word = level[0]
    even = tl.join(word.to(tl.int8), (word >> 16).to(tl.int8))
    odd = tl.join((word >> 8).to(tl.int8), (word >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [ROWS, WIDTH * 32])


@triton.jit
def take_bytes(
    words,
    zero,
    row,
    unit,
    last,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Codes of units ``[WIDTH]`` before ``last``, less ``zero`` ``[ROWS, 1]``: bytes with a sign.

    Returns ``[ROWS, 32 * WIDTH]`` int8. Differences must be from -128 to 127.
    """
    taken = ()
    for number in tl.static_range(BITS):
        at = words + (row[:, None] * BITS + number) * UNITS + unit[None, :]
        taken = taken + (tl.load(at, mask=(unit < last)[None, :], other=0),)
    quads = ()
    for quad in tl.static_range(8):
        codes = quad_of(taken, quad, BITS)
        if BITS < 8:
            # No byte borrows from the next: each has 128 more than it will in the end.
            codes = ((codes | -2139062144) - zero * 16843009) ^ -2139062144
        else:
            codes = codes ^ -2139062144
        quads = quads + (codes,)
    return side_by_side(quads, ROWS, WIDTH)


@triton.jit
def multiply_tiles(
    words,
    weight_scales,
    weight_zeros,
    turns,
    base,
    entry_values,
    entry_places,
    entry_rows,
    bounds,
    steps,
    codes,
    sums,
    scales,
    shifts,
    batch,
    result,
    rows,
    groups,
    count,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAM: tl.constexpr,
    WIDTH: tl.constexpr,
    COMMON: tl.constexpr,
    CHUNK: tl.constexpr,
    TAKEN_OFF: tl.constexpr,
):
    """Compute a tile of the result: see `quantine.kernels.integer.triton.many_rows`."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(number, rows - 1)
    taker = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    there = taker < batch
    line = taker.to(tl.int64) * (32 * UNITS)
    middle: tl.constexpr = 2 ** (BITS - 1)
    total = tl.zeros([ROWS, BATCH], tl.float32)
    for turn in range(count):
        first = tl.multiple_of(tl.load(turns + turn), COMMON)
        last = tl.multiple_of(tl.load(turns + count + turn), COMMON)
        group = tl.load(turns + 2 * count + turn)
        unit = first + tl.arange(0, WIDTH)
        off = tl.full([ROWS], middle, tl.int32)
        rest = tl.zeros([ROWS], tl.float32)
        if weight_zeros is not None:
            zero = tl.load(weight_zeros + row * groups + group)
            if TAKEN_OFF:
                off = zero.to(tl.int32)
            else:
                rest = zero.to(tl.float32) - middle
        weights = take_bytes(words, off[:, None], row, unit, last, BITS, UNITS, ROWS, WIDTH)
        place = first * 32 + tl.arange(0, WIDTH * 32)
        seen = (place < last * 32)[:, None] & there[None, :]
        met = tl.load(codes + place[:, None] + line[None, :], mask=seen, other=0)
        part = tl.dot(weights, met, out_dtype=tl.int32).to(tl.float32)
        if weight_zeros is not None and not TAKEN_OFF:
            at = sums + taker.to(tl.int64)[:, None] * UNITS + unit[None, :]
            added = tl.load(at, mask=there[:, None] & (unit < last)[None, :], other=0.0)
            part -= rest[:, None] * tl.sum(added, 1)[None, :]
        scale = tl.load(weight_scales + row * groups + group).to(tl.float32)
        if steps is not None:
            scale *= tl.load(steps + first)
        total += part * scale[:, None]
    if bounds is not None:
        begun = tl.program_id(0) * (ROWS // PROGRAM)
        programs = tl.cdiv(rows, PROGRAM)
        last = tl.load(bounds + tl.minimum(begun + ROWS // PROGRAM, programs))
        for start in range(tl.load(bounds + begun), last, CHUNK):
            entry = start + tl.arange(0, CHUNK)
            kept = entry < last
            place = tl.load(entry_places + entry, mask=kept, other=0)
            seen = kept[:, None] & there[None, :]
            met = tl.load(codes + place[:, None] + line[None, :], mask=seen, other=0)
            mine = tl.load(entry_rows + entry, mask=kept, other=-1)[None, :] == number[:, None]
            value = tl.load(entry_values + entry, mask=kept, other=0.0)
            added = tl.where(mine, value[None, :], 0.0)
            total = tl.dot(added, met.to(tl.float32), total, input_precision="tf32x3")
    total -= tl.load(shifts + taker, mask=there, other=0.0)[None, :] * tl.load(base + row)[:, None]
    total *= tl.load(scales + taker, mask=there, other=0.0)[None, :]
    at = result + taker[None, :].to(tl.int64) * rows + number[:, None]
    tl.store(at, total.to(result.dtype.element_ty), mask=(number < rows)[:, None] & there[None, :])
