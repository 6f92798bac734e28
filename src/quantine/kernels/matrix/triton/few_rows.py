"""Products of a packed matrix with few rows of activations: as fast as the codes can be read.

A program multiplies a few whole rows of the matrix, so nothing is split, nothing has to be summed
between programs, and results do not depend on the order in which programs run. Activations are read
once for all rows of the program. See docs/gpu.md.

The meaning is `quantine.kernels.matrix.reference.multiply_reference` (``exact``), to the precision
of float16: products of 16 codes are summed in float16, everything else in float32.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantine.kernels.matrix.triton.parts import (
    codes_times,
    high_half,
    is_interpreted,
    low_half,
    outliers_times,
    take_pairs,
    take_statistics,
    take_words,
    two_halves,
)
from quantine.kernels.matrix.units.activations import Arranged
from quantine.kernels.matrix.units.instructions import (
    PAIR_TIMES_PAIR,
    pairs_product,
    unit_product,
)
from quantine.kernels.matrix.units.layout import TOGETHER
from quantine.kernels.matrix.units.statistics import ColumnGroups, RowGroups
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix

LANES: Final = 32
"""Threads of a warp."""
MOST_WARPS: Final = 4
"""Warps of a program where rows are long."""
CHUNK: Final = 128
"""Outliers that a program reads at once."""
BLOCK: Final = 4
"""Rows that a program of groups along outputs multiplies at once."""


def multiply(matrix: UnitMatrix, x: Arranged, dtype: torch.dtype) -> Tensor:
    """``x @ W.T`` ``[batch, rows]`` in ``dtype``."""
    result = torch.empty(len(x.words), matrix.rows, dtype=dtype, device=x.words.device)
    kernel, operands, settings = call(matrix, x, result)
    kernel[(triton.cdiv(matrix.rows, matrix.program),)](*operands, **settings)
    return result


def call(matrix: UnitMatrix, x: Arranged, result: Tensor) -> tuple[Any, list[Any], dict[str, Any]]:
    """The kernel for ``matrix``, its operands in order, and what is fixed when it is compiled."""
    entries, groups = matrix.entries, matrix.groups
    warps = 1
    while warps < MOST_WARPS and warps * LANES * TOGETHER < matrix.units:
        warps *= 2
    settings: dict[str, Any] = {
        "BITS": matrix.bits,
        "UNITS": matrix.units,
        "BATCH": len(x.words),
        "ROWS": matrix.program,
        "WIDTH": warps * LANES * TOGETHER,
        "CHUNK": CHUNK,
        "num_warps": warps,
    }
    of_outliers = [None, None, None]
    if entries is not None:
        of_outliers = [entries.words, entries.rows, entries.bounds]
    of_x = [x.words, x.words.view(torch.float16), x.factors]
    if isinstance(groups, RowGroups):
        kernel: Any = _rows
        of_groups = [groups.words, groups.scale_grids, groups.zero_grids, x.sums]
        settings |= {
            "TILE": groups.tile,
            "SPAN": groups.span,
            "PLANES": groups.planes,
            "SCALE_BITS": groups.scale_bits,
            "ZERO_BITS": groups.zero_bits,
        }
    else:
        assert isinstance(groups, ColumnGroups)
        kernel = _columns
        of_groups = [groups.scales, groups.zeros, groups.factor]
        settings |= {"SIZE": groups.size, "BLOCK": min(BLOCK, matrix.program)}
        plain = is_interpreted(kernel)
        settings["SUM_TEXT"], settings["SUM_CONSTRAINTS"] = ("", "") if plain else pairs_product()
        settings["PAIR_TEXT"], settings["PAIR_CONSTRAINTS"] = (
            ("", "") if plain else PAIR_TIMES_PAIR
        )
    settings["TEXT"], settings["CONSTRAINTS"] = (
        ("", "") if is_interpreted(kernel) else unit_product(matrix.bits)
    )
    operands = [matrix.words, *of_groups, *of_outliers, *of_x, result, matrix.rows]
    return kernel, operands, settings


@triton.jit
def _rows(
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
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):
    program = tl.program_id(0)
    first, last = 0, 0
    if bounds is not None:
        # Asked for first, so that they are there when the entries are read at the end.
        first, last = tl.load(bounds + program), tl.load(bounds + program + 1)
    number = program * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(number, rows - 1)
    tile = program * ROWS // TILE + tl.zeros([1], tl.int32)
    units_of_group: tl.constexpr = SPAN // 32 if SPAN >= 32 else 1
    groups: tl.constexpr = UNITS // units_of_group
    totals = ()
    for m in tl.static_range(BATCH):
        totals = totals + (tl.zeros([ROWS], tl.float32),)
    for start in tl.static_range(0, UNITS, WIDTH):
        whole: tl.constexpr = start + WIDTH <= UNITS
        unit = start + tl.arange(0, WIDTH)
        group = start // units_of_group + tl.arange(0, WIDTH // units_of_group)
        taken = take_words(words, row, unit, UNITS, BITS, whole)
        scales, zeros = (), ()
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
            scales, zeros = scales + (scale,), zeros + (zero,)
        more = ()
        for m in tl.static_range(BATCH):
            pairs = take_pairs(x + m * 16 * UNITS, unit, UNITS, ROWS, whole)
            low, high = codes_times(taken, pairs, BITS, TEXT, CONSTRAINTS)
            if PLANES == 2:
                parts = (low, high)
            else:
                both = low + high
                if units_of_group > 1:
                    shape: tl.constexpr = [ROWS, WIDTH // units_of_group, units_of_group]
                    both = tl.sum(tl.reshape(both, shape), 2)
                parts = (both,)
            total = totals[m]
            for plane in tl.static_range(PLANES):
                part = parts[plane]
                if ZERO_BITS != 0:
                    at = sums + (m * PLANES + plane) * groups + group
                    part -= zeros[plane] * tl.load(at, mask=group < groups, other=0.0)[None, :]
                total += tl.sum(part * scales[plane], 1)
            more = more + (total,)
        totals = more
    for m in tl.static_range(BATCH):
        total = totals[m]
        if bounds is not None:
            met = halves + m * 32 * UNITS
            total = outliers_times(total, entry_words, entry_rows, first, last, met, ROWS, CHUNK)
        total *= tl.load(factors + m)
        tl.store(result + m * rows + number, total.to(result.dtype.element_ty), mask=number < rows)


@triton.jit
def _pairs_times(
    one,
    other,
    SUM_TEXT: tl.constexpr,
    SUM_CONSTRAINTS: tl.constexpr,
):
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
def _columns(
    words,
    scales,
    zeros,
    factor,
    entry_words,
    entry_rows,
    bounds,
    x,
    halves,
    factors,
    result,
    rows,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM_TEXT: tl.constexpr,
    SUM_CONSTRAINTS: tl.constexpr,
    PAIR_TEXT: tl.constexpr,
    PAIR_CONSTRAINTS: tl.constexpr,
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):
    program = tl.program_id(0)
    first, last = 0, 0
    if bounds is not None:
        first, last = tl.load(bounds + program), tl.load(bounds + program + 1)
    line = program * ROWS // SIZE * 16 * UNITS
    for m in tl.static_range(BATCH):
        # All rows of the program are of one group: activations are multiplied by its scales once.
        totals = ()
        for block in tl.static_range(ROWS // BLOCK):
            totals = totals + (tl.zeros([BLOCK], tl.float32),)
        taken_off = 0.0
        for start in tl.static_range(0, UNITS, WIDTH):
            whole: tl.constexpr = start + WIDTH <= UNITS
            unit = start + tl.arange(0, WIDTH)
            met = take_pairs(x + m * 16 * UNITS, unit, UNITS, BLOCK, whole)
            scale = take_pairs(scales + line, unit, UNITS, BLOCK, whole)
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
                zero = take_pairs(zeros + line, unit, UNITS, BLOCK, whole)
                taken_off += tl.sum(_pairs_times(zero, scaled, SUM_TEXT, SUM_CONSTRAINTS), 1)
            more = ()
            for block in tl.static_range(ROWS // BLOCK):
                number = program * ROWS + block * BLOCK + tl.arange(0, BLOCK)
                row = tl.minimum(number, rows - 1)
                taken = take_words(words, row, unit, UNITS, BITS, whole)
                low, high = codes_times(taken, scaled, BITS, TEXT, CONSTRAINTS)
                more = more + (totals[block] + tl.sum(low + high, 1),)
            totals = more
        for block in tl.static_range(ROWS // BLOCK):
            total = (totals[block] - taken_off) * factor
            if bounds is not None:
                at = halves + m * 32 * UNITS
                rows_at = entry_rows
                total = outliers_times(
                    total, entry_words, rows_at, first, last, at, BLOCK, CHUNK, block * BLOCK
                )
            number = program * ROWS + block * BLOCK + tl.arange(0, BLOCK)
            total *= tl.load(factors + m)
            tl.store(
                result + m * rows + number, total.to(result.dtype.element_ty), mask=number < rows
            )
