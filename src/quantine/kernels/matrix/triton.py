"""Products of packed matrices with few rows of activations, on NVIDIA's GPUs by Triton.

Imported at first use. A program multiplies a few whole rows of the matrix, so nothing is split,
nothing has to be summed between programs, and results do not depend on the order in which programs
run. Activations are read once for all rows of the program. See docs/gpu.md.

The meaning is `quantine.kernels.matrix.reference.multiply_reference` (``exact``), to the precision
of float16: products of 16 codes are summed in float16, everything else in float32.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantine.kernels.matrix.activations import LARGEST, Arranged
from quantine.kernels.matrix.unit_asm import unit_product
from quantine.kernels.matrix.unit_matrix import UnitMatrix
from quantine.kernels.matrix.units import PAIRS, TOGETHER, UNIT

LANES: Final = 32
"""Threads of a warp."""
MOST_WARPS: Final = 4
"""Warps of a program where rows are long."""
CHUNK: Final = 128
"""Outliers that a program reads at once."""
ARRANGED: Final = 1024
"""Activations that a program arranges."""


def arrange(x: Tensor, matrix: UnitMatrix) -> Arranged:
    """`quantine.kernels.matrix.activations.arrange_reference` on a GPU.

    Args:
        x: ``[batch, columns]`` float32, float16 or bfloat16, contiguous.
        matrix: the matrix that it is arranged for.
    """
    batch, planes = len(x), matrix.fields.words.shape[0]
    words = x.new_empty(batch, PAIRS, matrix.units, dtype=torch.int32)
    sums = x.new_empty(batch, planes, matrix.fields.words.shape[2], dtype=torch.float32)
    factors = x.new_empty(batch, dtype=torch.float32)
    chunks = triton.cdiv(matrix.units * UNIT, ARRANGED)
    _arrange[(chunks, batch)](
        x,
        matrix.source,
        words.view(torch.float16),
        sums,
        factors,
        matrix.columns,
        UNITS=matrix.units,
        SPAN=matrix.span,
        PLANES=planes,
        WIDTH=ARRANGED,
        LARGEST=LARGEST,
    )
    return Arranged(words, sums, factors)


def multiply(matrix: UnitMatrix, x: Arranged, dtype: torch.dtype) -> Tensor:
    """``x @ W.T`` ``[batch, rows]`` in ``dtype``; the weights are read once for all rows of ``x``."""
    batch = len(x.words)
    result = torch.empty(batch, matrix.rows, dtype=dtype, device=x.words.device)
    settings = settings_of(matrix, batch)
    _multiply[(triton.cdiv(matrix.rows, matrix.program),)](*operands(matrix, x, result), **settings)
    return result


def operands(matrix: UnitMatrix, x: Arranged, result: Tensor) -> list[Any]:
    """The operands of the kernel, in its order."""
    fields, entries = matrix.fields, matrix.entries
    return [
        matrix.words,
        fields.words,
        fields.scale_grids,
        fields.zero_grids,
        None if entries is None else entries.words,
        None if entries is None else entries.rows,
        None if entries is None else entries.bounds,
        x.words,
        x.words.view(torch.float16),
        x.sums,
        x.factors,
        result,
        matrix.rows,
    ]


def settings_of(matrix: UnitMatrix, batch: int) -> dict[str, Any]:
    """What is fixed when the kernel is compiled for ``matrix`` and ``batch`` rows."""
    warps = 1
    while warps < MOST_WARPS and warps * LANES * TOGETHER < matrix.units:
        warps *= 2
    width = warps * LANES * TOGETHER
    text, constraints = unit_product(matrix.bits)
    interpreted = not isinstance(_multiply, triton.JITFunction)
    return {
        "BITS": matrix.bits,
        "UNITS": matrix.units,
        "TILE": matrix.fields.tile,
        "SPAN": matrix.span,
        "PLANES": matrix.fields.words.shape[0],
        "GROUPS": matrix.fields.words.shape[2],
        "SCALE_BITS": matrix.fields.scale_bits,
        "ZERO_BITS": matrix.fields.zero_bits,
        "SCALE_GRIDS": matrix.fields.scale_grids is not None,
        "ZERO_GRIDS": matrix.fields.zero_grids is not None,
        "OUTLIERS": matrix.entries is not None,
        "BATCH": batch,
        "ROWS": matrix.program,
        "WIDTH": width,
        "CHUNK": CHUNK,
        "TEXT": "" if interpreted else text,
        "CONSTRAINTS": constraints,
        "num_warps": warps,
    }


@triton.jit
def _arrange(
    x,
    source,
    halves,
    sums,
    factors,
    columns,
    UNITS: tl.constexpr,
    SPAN: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1)
    x += row * columns
    largest = tl.zeros([WIDTH], tl.float32)
    for start in range(0, columns, WIDTH):
        at = start + tl.arange(0, WIDTH)
        value = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    # The power of two is made of the exponent's bits: that of the largest value, less LARGEST.
    top = tl.max(largest, 0)
    exponent = (top.to(tl.int32, bitcast=True) >> 23) - (LARGEST - 1)
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    factor = tl.where(top > 0, (exponent << 23).to(tl.float32, bitcast=True), 1.0)
    inverse = tl.where(top > 0, ((254 - exponent) << 23).to(tl.float32, bitcast=True), 1.0)
    tl.store(factors + row, factor)
    place = chunk * WIDTH + tl.arange(0, WIDTH)
    inside = place < columns
    at = place
    if source is not None:
        at = tl.load(source + place, mask=inside, other=0)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse
    half = value.to(tl.float16)
    unit, within = place // 32, place % 32
    target = ((row * 16 + within % 16) * UNITS + unit) * 2 + within // 16
    tl.store(halves + target, half, mask=place < UNITS * 32)
    total = tl.sum(tl.reshape(half.to(tl.float32), [WIDTH // SPAN, SPAN]), 1)
    run = chunk * (WIDTH // SPAN) + tl.arange(0, WIDTH // SPAN)
    groups = UNITS * 32 // SPAN // PLANES
    tl.store(
        sums + (row * PLANES + run % PLANES) * groups + run // PLANES,
        total,
        mask=run < groups * PLANES,
    )


@triton.jit
def _plain_product(words, xs, BITS: tl.constexpr):
    # What the instructions of `unit_asm` compute, in float32, for the interpreter.
    whole: tl.constexpr = 16 // BITS
    spare: tl.constexpr = 16 - whole * BITS
    low_sum = tl.zeros(words[0].shape, tl.float32)
    high_sum = tl.zeros(words[0].shape, tl.float32)
    for pair in tl.static_range(16):
        low = tl.zeros(words[0].shape, tl.int32)
        high = tl.zeros(words[0].shape, tl.int32)
        if pair < whole * BITS:
            word = words[pair // whole]
            low = (word >> (pair % whole * BITS)) & (2**BITS - 1)
            high = (word >> (pair % whole * BITS + 16)) & (2**BITS - 1)
        else:
            for bit in tl.static_range(BITS):
                number: tl.constexpr = (pair - whole * BITS) * BITS + bit
                word = words[number // spare]
                low += ((word >> (whole * BITS + number % spare)) & 1) << bit
                high += ((word >> (whole * BITS + number % spare + 16)) & 1) << bit
        x = xs[pair]
        low_x = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high_x = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low_sum += (low - 2 ** (BITS - 1)).to(tl.float32) * low_x
        high_sum += (high - 2 ** (BITS - 1)).to(tl.float32) * high_x
    return low_sum, high_sum


@triton.jit
def _float16(bits):
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _on_grid(code, grids):
    step, zero = _float16(grids), _float16(grids >> 16)
    return step[None, :] * (code.to(tl.float32) - zero[None, :])


@triton.jit
def _multiply(
    words,
    fields,
    scale_grids,
    zero_grids,
    entry_words,
    entry_rows,
    bounds,
    x,
    x_halves,
    sums,
    factors,
    result,
    rows,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    SCALE_GRIDS: tl.constexpr,
    ZERO_GRIDS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):
    program = tl.program_id(0)
    if OUTLIERS:
        first_entry = tl.load(bounds + program)
        last_entry = tl.load(bounds + program + 1)
    numbers = program * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(numbers, rows - 1)
    tile = program * ROWS // TILE
    per_group: tl.constexpr = SPAN // 32 if SPAN >= 32 else 1
    totals = ()
    for m in tl.static_range(BATCH):
        totals = totals + (tl.zeros([ROWS], tl.float32),)
    for start in tl.static_range(0, UNITS, WIDTH):
        unit = start + tl.arange(0, WIDTH)
        inside = unit < UNITS
        taken = ()
        for b in tl.static_range(BITS):
            at = words + (row[:, None] * BITS + b) * UNITS + unit[None, :]
            if start + WIDTH > UNITS:
                word = tl.load(at, mask=inside[None, :], other=0, eviction_policy="evict_first")
            else:
                word = tl.load(at, eviction_policy="evict_first")
            taken = taken + (word,)
        scales, zeros = (), ()
        group = start // per_group + tl.arange(0, WIDTH // per_group)
        held = group < GROUPS
        for plane in tl.static_range(PLANES):
            at = fields + (plane * rows + row[:, None]) * GROUPS + group[None, :]
            if start + WIDTH > UNITS:
                field = tl.load(at, mask=held[None, :], other=0).to(tl.int32)
            else:
                field = tl.load(at).to(tl.int32)
            grid_at = (tile * PLANES + plane) * GROUPS + group
            scale = field & ((1 << SCALE_BITS) - 1)
            if SCALE_GRIDS:
                scale = _on_grid(scale, tl.load(scale_grids + grid_at, mask=held, other=0))
            else:
                scale = _float16(scale)
            scales = scales + (scale,)
            zero = (field >> SCALE_BITS) & ((1 << ZERO_BITS) - 1)
            if ZERO_GRIDS:
                zero = _on_grid(zero, tl.load(zero_grids + grid_at, mask=held, other=0))
            elif ZERO_BITS == 16:
                zero = _float16(zero)
            else:
                zero = zero.to(tl.float32)
            zeros = zeros + (zero - 2 ** (BITS - 1),)
        new = ()
        for m in tl.static_range(BATCH):
            xs = ()
            for p in tl.static_range(16):
                at = x + (m * 16 + p) * UNITS + unit
                if start + WIDTH > UNITS:
                    pair = tl.load(at, mask=inside, other=0)
                else:
                    pair = tl.load(at)
                xs = xs + (tl.broadcast_to(pair[None, :], ROWS, WIDTH),)
            if TEXT == "":
                low, high = _plain_product(taken, xs, BITS)
            else:
                low, high = tl.inline_asm_elementwise(
                    TEXT, CONSTRAINTS, taken + xs, dtype=(tl.float32, tl.float32), is_pure=True, pack=1
                )
            total = totals[m]
            if PLANES == 2:
                parts = (low, high)
            else:
                both = low + high
                if per_group > 1:
                    both = tl.sum(tl.reshape(both, [ROWS, WIDTH // per_group, per_group]), 2)
                parts = (both,)
            for plane in tl.static_range(PLANES):
                at = sums + (m * PLANES + plane) * GROUPS + group
                of_x = tl.load(at, mask=held, other=0.0)
                part = parts[plane]
                if ZERO_BITS != 0:
                    part = part - zeros[plane] * of_x[None, :]
                total += tl.sum(part * scales[plane], 1)
            new = new + (total,)
        totals = new
    for m in tl.static_range(BATCH):
        total = totals[m]
        if OUTLIERS:
            for first in range(first_entry, last_entry, CHUNK):
                number = first + tl.arange(0, CHUNK)
                there = number < last_entry
                entry = tl.load(entry_words + number, mask=there, other=0)
                of_row = tl.load(entry_rows + number, mask=there, other=0).to(tl.int32)
                place = (entry >> 16) & 0xFFFF
                met = tl.load(x_halves + m * 32 * UNITS + place, mask=there, other=0.0)
                added = _float16(entry) * met.to(tl.float32)
                mine = of_row[None, :] == tl.arange(0, ROWS)[:, None]
                total += tl.sum(tl.where(mine, added[None, :], 0.0), 1)
        value = total * tl.load(factors + m)
        tl.store(result + m * rows + numbers, value.to(result.dtype.element_ty), mask=numbers < rows)
