"""Rows of activations that have an expert each, times the matrices of the experts.

Matrices of experts lie one after the other. Each program finds the part that is its expert's, and
then is the program for one matrix. Where the expert of its rows is of another stack it does
nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.matrix.triton.programs.arrangement import arrange
from quantine.kernels.matrix.triton.programs.column_groups import multiply_column_groups
from quantine.kernels.matrix.triton.programs.row_groups import multiply_row_groups
from quantine.kernels.matrix.triton.programs.tiles import multiply_tiles


@triton.jit
def _part(tensor, place, step):
    """The part of a tensor that is of the expert at ``place``; ``None`` where there is none."""
    found = None
    if tensor is not None:
        found = tensor + place * step
    return found


@triton.jit
def _entries(tensor, starts, place):
    """The outliers of the expert at ``place``; ``None`` where there are none."""
    found = None
    if tensor is not None:
        found = tensor + tl.load(starts + place)
    return found


@triton.jit
def arrange_for_experts(
    places,
    source_step,
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
    IN_PAIRS: tl.constexpr,
):
    """Arrange a chunk of a row in its expert's order: see `arrange`."""
    place = tl.load(places + tl.program_id(0)).to(tl.int64)
    if place >= 0:
        arrange(
            x,
            source + place * source_step,
            halves,
            sums,
            factors,
            columns,
            UNITS,
            SPAN,
            PLANES,
            WIDTH,
            LARGEST,
            IN_PAIRS,
        )


@triton.jit
def multiply_row_groups_of_experts(
    places,
    starts,
    word_step,
    field_step,
    scale_step,
    zero_step,
    bound_step,
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
    multipliers,
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
    UNIT_TEXT: tl.constexpr,
    UNIT_CONSTRAINTS: tl.constexpr,
):
    """Multiply ``ROWS`` rows of the expert of one row of activations: see `few_rows`."""
    taker = tl.program_id(1).to(tl.int64)
    place = tl.load(places + taker).to(tl.int64)
    if place >= 0:
        multiply_row_groups(
            words + place * word_step,
            fields + place * field_step,
            _part(scale_grids, place, scale_step),
            _part(zero_grids, place, zero_step),
            sums + taker * (UNITS * 32 // SPAN),
            _entries(entry_words, starts, place),
            _entries(entry_rows, starts, place),
            _part(bounds, place, bound_step),
            x + taker * (16 * UNITS),
            halves + taker * (32 * UNITS),
            factors + taker,
            tl.load(multipliers + place),
            result + taker * rows,
            rows,
            BITS,
            UNITS,
            BATCH,
            ROWS,
            BLOCK,
            WIDTH,
            CHUNK,
            TILE,
            SPAN,
            PLANES,
            SCALE_BITS,
            ZERO_BITS,
            UNIT_TEXT,
            UNIT_CONSTRAINTS,
        )


@triton.jit
def multiply_column_groups_of_experts(
    places,
    starts,
    word_step,
    scale_step,
    zero_step,
    factor_step,
    bound_step,
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
    multipliers,
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
    """As `multiply_row_groups_of_experts`, where groups run along outputs."""
    taker = tl.program_id(1).to(tl.int64)
    place = tl.load(places + taker).to(tl.int64)
    if place >= 0:
        multiply_column_groups(
            words + place * word_step,
            scales + place * scale_step,
            _part(zeros, place, zero_step),
            group_factors + place * factor_step,
            _entries(entry_words, starts, place),
            _entries(entry_rows, starts, place),
            _part(bounds, place, bound_step),
            x + taker * (16 * UNITS),
            halves + taker * (32 * UNITS),
            factors + taker,
            tl.load(multipliers + place),
            result + taker * rows,
            rows,
            BITS,
            UNITS,
            ROWS,
            BLOCK,
            WIDTH,
            CHUNK,
            SIZE,
            SUM_TEXT,
            SUM_CONSTRAINTS,
            PAIR_TEXT,
            PAIR_CONSTRAINTS,
            UNIT_TEXT,
            UNIT_CONSTRAINTS,
        )


@triton.jit
def multiply_tiles_of_experts(
    places,
    firsts,
    stops,
    starts,
    word_step,
    field_step,
    scale_step,
    zero_step,
    factor_step,
    bound_step,
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
    multipliers,
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
    """Compute a tile of the result, rows ``firsts`` to ``stops - 1``, of one expert."""
    tile = tl.program_id(1)
    place = tl.load(places + tile).to(tl.int64)
    first, stop = tl.load(firsts + tile), tl.load(stops + tile)
    if (place >= 0) & (first < stop):
        # The program for one matrix begins at the row that its number says.
        line = (first - tile * BATCH).to(tl.int64)
        multiply_tiles(
            words + place * word_step,
            fields + place * field_step,
            _part(scale_grids, place, scale_step),
            _part(zero_grids, place, zero_step),
            row_factors + place * factor_step,
            _entries(entry_words, starts, place),
            _entries(entry_rows, starts, place),
            _part(bounds, place, bound_step),
            x + line * (32 * UNITS),
            factors + line,
            stop - line,
            tl.load(multipliers + place),
            result + line * rows,
            rows,
            BITS,
            UNITS,
            BATCH,
            ROWS,
            PROGRAM,
            WIDTH,
            CHUNK,
            ALONG_OUTPUTS,
            SIZE,
            SPAN,
            PLANES,
            SCALE_BITS,
            ZERO_BITS,
            UNIT_TEXT,
            UNIT_CONSTRAINTS,
        )
