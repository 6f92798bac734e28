"""What several kernels do with words of codes, statistics and activations.

Each program runs in Triton's interpreter too, which knows no instructions of a GPU; there ``TEXT``
is empty, and plain operations compute the same in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def low_half(word):
    """The float16 in the low half of a word."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def high_half(word):
    """The float16 in the high half of a word."""
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def two_halves(low, high):
    """A word of two float16."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def take_words(words, row, unit, UNITS: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """The words of units ``unit`` ``[n]`` of rows ``row`` ``[m]``: ``BITS`` tensors ``[m, n]``.

    Units beyond the last are zero; ``WHOLE`` says that there are none.
    """
    taken = ()
    for number in tl.static_range(BITS):
        at = words + (row[:, None] * BITS + number) * UNITS + unit[None, :]
        if WHOLE:
            word = tl.load(at, eviction_policy="evict_first")
        else:
            inside = (unit < UNITS)[None, :]
            word = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
        taken = taken + (word,)
    return taken


@triton.jit
def take_pair(pairs, number, unit, UNITS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Word ``number`` of units ``unit`` ``[n]`` of activations, repeated as ``[ROWS, n]``."""
    if WHOLE:
        word = tl.load(pairs + number * UNITS + unit)
    else:
        word = tl.load(pairs + number * UNITS + unit, mask=unit < UNITS, other=0)
    return tl.broadcast_to(word[None, :], ROWS, unit.shape[0])


@triton.jit
def take_pairs(pairs, unit, UNITS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """The 16 words of units ``unit`` ``[n]`` of activations, each as of `take_pair`."""
    taken = ()
    for number in tl.static_range(16):
        taken = taken + (take_pair(pairs, number, unit, UNITS, ROWS, WHOLE),)
    return taken


@triton.jit
def code_of(words, pair: tl.constexpr, half: tl.constexpr, BITS: tl.constexpr):
    """The codes of one pair of each unit, those of the low (0) or high (1) half, as int32."""
    whole: tl.constexpr = 16 // BITS
    spare: tl.constexpr = 16 - whole * BITS
    if pair < whole * BITS:
        code = (words[pair // whole] >> (pair % whole * BITS + 16 * half)) & (2**BITS - 1)
    else:
        code = tl.zeros(words[0].shape, tl.int32)
        for bit in tl.static_range(BITS):
            number: tl.constexpr = (pair - whole * BITS) * BITS + bit
            place: tl.constexpr = whole * BITS + number % spare + 16 * half
            code += ((words[number // spare] >> place) & 1) << bit
    return code


@triton.jit
def codes_times(words, pairs, BITS: tl.constexpr, TEXT: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """Sums of codes, less the middle code, times activations: of low halves, and of high halves."""
    if TEXT != "":
        low, high = tl.inline_asm_elementwise(
            TEXT, CONSTRAINTS, words + pairs, dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        middle: tl.constexpr = 2 ** (BITS - 1)
        low = tl.zeros(words[0].shape, tl.float32)
        high = tl.zeros(words[0].shape, tl.float32)
        for pair in tl.static_range(16):
            x = pairs[pair]
            low += (code_of(words, pair, 0, BITS) - middle) * low_half(x).to(tl.float32)
            high += (code_of(words, pair, 1, BITS) - middle) * high_half(x).to(tl.float32)
    return low, high


@triton.jit
def on_grid(code, grids):
    """Scales or zero points ``[m, n]`` float32 from their codes and second grids of that shape."""
    return low_half(grids).to(tl.float32) * (code.to(tl.float32) - high_half(grids).to(tl.float32))


@triton.jit
def take_grids(grids, tile, plane: tl.constexpr, group, PLANES: tl.constexpr, GROUPS: tl.constexpr):
    """The second grids of groups ``[n]`` in the tiles ``[m]`` (1 where all rows have one)."""
    at = (tile[:, None] * PLANES + plane) * GROUPS + group[None, :]
    return tl.load(grids + at, mask=(group < GROUPS)[None, :], other=0)


@triton.jit
def take_statistics(
    fields,
    scale_grids,
    zero_grids,
    row,
    rows,
    tile,
    plane: tl.constexpr,
    group,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    OWN: tl.constexpr,
):
    """Scales, and zero points less the middle code, of groups ``group`` ``[n]`` of rows ``[m]``.

    Both are float32 ``[m, n]``. ``tile`` is the tile of each row, ``[m]``, or of all, ``[1]``.
    ``OWN`` is the number of groups of the units that a thread has: it reads the statistics of these
    and no others, so that they need not move between threads.
    """
    held = group < GROUPS
    size: tl.constexpr = fields.dtype.element_ty.primitive_bitwidth // 8
    at = fields + (plane * rows + row[:, None]) * GROUPS + group[None, :]
    at = tl.max_contiguous(tl.multiple_of(at, [1, OWN * size]), [1, OWN])
    field = tl.load(at, mask=held[None, :], other=0).to(tl.int32)
    scale = field & ((1 << SCALE_BITS) - 1)
    if scale_grids is not None:
        scale = on_grid(scale, take_grids(scale_grids, tile, plane, group, PLANES, GROUPS))
    else:
        scale = low_half(scale).to(tl.float32)
    zero = (field >> SCALE_BITS) & ((1 << ZERO_BITS) - 1)
    if zero_grids is not None:
        zero = on_grid(zero, take_grids(zero_grids, tile, plane, group, PLANES, GROUPS))
    elif ZERO_BITS == 16:
        zero = low_half(zero).to(tl.float32)
    else:
        zero = zero.to(tl.float32)
    return scale, zero - 2 ** (BITS - 1)


@triton.jit
def outliers_times(
    words,
    rows,
    first,
    last,
    halves,
    row,
    STEP: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums of the products of outliers ``first`` to ``last - 1`` with ``BATCH`` activations' rows.

    A tuple of ``[ROWS]`` for each, of the program's rows from ``row`` on. Places of outliers count
    from ``halves``, and from ``STEP`` more for each row of activations. Each thread sums what it
    reads; threads are summed at the end.
    """
    totals = ()
    for m in tl.static_range(BATCH):
        totals = totals + (tl.zeros([ROWS, CHUNK], tl.float32),)
    for start in range(first, last, CHUNK):
        number = start + tl.arange(0, CHUNK)
        there = number < last
        entry = tl.load(words + number, mask=there, other=0)
        of_row = tl.load(rows + number, mask=there, other=0).to(tl.int32)
        mine = of_row[None, :] == row + tl.arange(0, ROWS)[:, None]
        more = ()
        for m in tl.static_range(BATCH):
            at = halves + m * STEP + ((entry >> 16) & 0xFFFF)
            met = tl.load(at, mask=there, other=0.0)
            added = low_half(entry).to(tl.float32) * met.to(tl.float32)
            more = more + (totals[m] + tl.where(mine, added[None, :], 0.0),)
        totals = more
    sums = ()
    for m in tl.static_range(BATCH):
        sums = sums + (tl.sum(totals[m], 1),)
    return sums


@triton.jit
def store_rows(result, total, first, rows, ROWS: tl.constexpr):
    """Store ``total`` ``[ROWS]``, which each thread has, at places from ``first`` to ``rows``.

    One thread stores one number after the other. If each stored one, they would move through shared
    memory first, and a loop would wait at a barrier until the numbers of its last turn are out.
    """
    for number in tl.static_range(ROWS):
        one = tl.sum(tl.where(tl.arange(0, ROWS) == number, total, 0.0), 0)
        at = first + number
        tl.store(result + at, one.to(result.dtype.element_ty), mask=at < rows)
