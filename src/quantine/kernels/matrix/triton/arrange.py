"""Activations brought into the order in which a matrix's units meet them."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.matrix.triton.programs import arrangement, experts
from quantine.kernels.matrix.units.activations import LARGEST, Arranged, Rows
from quantine.kernels.matrix.units.layout import PAIRS, UNIT
from quantine.kernels.matrix.units.statistics import RowGroups
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix

WIDTH: Final = 1024
"""Activations that a program arranges."""


def arrange(x: Tensor, matrix: UnitMatrix, places: Tensor | None = None) -> Arranged:
    """`quantine.kernels.matrix.units.activations.arrange_reference` on a GPU.

    Args:
        x: ``[batch, columns]`` float32, float16 or bfloat16, contiguous.
        matrix: the matrix that it is arranged for.
        places: ``[batch]`` int32 where it is the first of a stack: which of them each row is
            arranged for, -1 for none.
    """
    groups, sums = matrix.groups, None
    words = x.new_empty(len(x), PAIRS, matrix.units, dtype=torch.int32)
    factors = x.new_empty(len(x), dtype=torch.float32)
    if isinstance(groups, RowGroups):
        sums = x.new_empty(len(x), groups.planes, groups.words.shape[2], dtype=torch.float32)
    _launch(x, matrix, words.view(torch.float16), factors, sums, places)
    return Arranged(words, sums, factors)


def arrange_rows(x: Tensor, matrix: UnitMatrix, places: Tensor | None = None) -> Rows:
    """`quantine.kernels.matrix.units.activations.rows_reference` on a GPU, called as `arrange`."""
    halves = x.new_empty(len(x), matrix.units * UNIT, dtype=torch.float16)
    factors = x.new_empty(len(x), dtype=torch.float32)
    _launch(x, matrix, halves, factors, None, places)
    return Rows(halves, factors)


def _launch(
    x: Tensor,
    matrix: UnitMatrix,
    halves: Tensor,
    factors: Tensor,
    sums: Tensor | None,
    places: Tensor | None,
) -> None:
    program, operands, settings = launch_of(x, matrix, halves, factors, sums, places)
    # Rows first: CUDA takes no more than 65535 programs along the second axis, and a long text has
    # more rows of experts.
    with backend.launching(x):
        program[(len(x), triton.cdiv(matrix.units * UNIT, WIDTH))](*operands, **settings)


def launch_of(
    x: Tensor,
    matrix: UnitMatrix,
    halves: Tensor,
    factors: Tensor,
    sums: Tensor | None,
    places: Tensor | None = None,
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program for ``x``, its operands in order, and what is fixed when it is compiled.

    Args:
        x, matrix, places: as of `arrange`.
        halves, factors, sums: what it fills, as of `Arranged` or `Rows`.
    """
    groups, span, planes = matrix.groups, UNIT, 1
    if isinstance(groups, RowGroups):
        span, planes = groups.span, groups.planes
    settings = {
        "UNITS": matrix.units,
        "SPAN": span,
        "PLANES": planes,
        "WIDTH": WIDTH,
        "LARGEST": LARGEST,
        "IN_PAIRS": halves.dim() == 3,
        "num_warps": 4,
    }
    operands = [x, matrix.source, halves, sums, factors, matrix.columns]
    if places is None or matrix.source is None:
        return arrangement.arrange, operands, settings
    return experts.arrange_for_experts, [places, matrix.columns, *operands], settings
