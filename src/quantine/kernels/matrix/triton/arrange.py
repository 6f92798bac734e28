"""Activations brought into the order in which a matrix's units meet them."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantine.kernels.matrix.units.activations import LARGEST, Arranged, Rows
from quantine.kernels.matrix.units.layout import PAIRS, UNIT
from quantine.kernels.matrix.units.statistics import RowGroups
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix

WIDTH: Final = 1024
"""Activations that a program arranges."""


def arrange(x: Tensor, matrix: UnitMatrix) -> Arranged:
    """`quantine.kernels.matrix.units.activations.arrange_reference` on a GPU.

    Args:
        x: ``[batch, columns]`` float32, float16 or bfloat16, contiguous.
        matrix: the matrix that it is arranged for.
    """
    groups, sums = matrix.groups, None
    words = x.new_empty(len(x), PAIRS, matrix.units, dtype=torch.int32)
    factors = x.new_empty(len(x), dtype=torch.float32)
    if isinstance(groups, RowGroups):
        sums = x.new_empty(len(x), groups.planes, groups.words.shape[2], dtype=torch.float32)
    _launch(x, matrix, words.view(torch.float16), factors, sums)
    return Arranged(words, sums, factors)


def arrange_rows(x: Tensor, matrix: UnitMatrix) -> Rows:
    """`quantine.kernels.matrix.units.activations.rows_reference` on a GPU, ``x`` as of `arrange`."""
    halves = x.new_empty(len(x), matrix.units * UNIT, dtype=torch.float16)
    factors = x.new_empty(len(x), dtype=torch.float32)
    _launch(x, matrix, halves, factors, None)
    return Rows(halves, factors)


def _launch(
    x: Tensor, matrix: UnitMatrix, halves: Tensor, factors: Tensor, sums: Tensor | None
) -> None:
    groups = matrix.groups
    grouped = isinstance(groups, RowGroups)
    _arrange[(triton.cdiv(matrix.units * UNIT, WIDTH), len(x))](
        x,
        matrix.source,
        halves,
        sums,
        factors,
        matrix.columns,
        UNITS=matrix.units,
        SPAN=groups.span if grouped else UNIT,
        PLANES=groups.planes if grouped else 1,
        WIDTH=WIDTH,
        LARGEST=LARGEST,
        IN_PAIRS=halves.dim() == 3,
    )


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
    IN_PAIRS: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1)
    x += row * columns
    # Every program finds the row's largest value for itself: that needs no second launch.
    largest = tl.zeros([WIDTH], tl.float32)
    for start in range(0, columns, WIDTH):
        at = start + tl.arange(0, WIDTH)
        value = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    # A float32's exponent counts from 127; that of the factor stays where its inverse exists.
    top = tl.max(largest, 0)
    exponent = (top.to(tl.int32, bitcast=True) >> 23) - (LARGEST - 1)
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    exponent = tl.where(top > 0, exponent, 127)
    tl.store(factors + row, (exponent << 23).to(tl.float32, bitcast=True))
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    place = chunk * WIDTH + tl.arange(0, WIDTH)
    inside = place < columns
    at = place
    if source is not None:
        at = tl.load(source + place, mask=inside, other=0)
    half = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse).to(tl.float16)
    target = row * 32 * UNITS + place
    if IN_PAIRS:
        unit, within = place // 32, place % 32
        target = ((row * 16 + within % 16) * UNITS + unit) * 2 + within // 16
    tl.store(halves + target, half, mask=place < UNITS * 32)
    if sums is not None:
        total = tl.sum(tl.reshape(half.to(tl.float32), [WIDTH // SPAN, SPAN]), 1)
        run = chunk * (WIDTH // SPAN) + tl.arange(0, WIDTH // SPAN)
        groups: tl.constexpr = UNITS * 32 // SPAN // PLANES
        target = (row * PLANES + run % PLANES) * groups + run // PLANES
        tl.store(sums + target, total, mask=run < groups * PLANES)
