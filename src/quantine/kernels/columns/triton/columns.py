"""A block of the column loop on a GPU: a launch for each run of columns, none for a column."""

from __future__ import annotations

from typing import Final

import torch
import triton

from quantine.kernels.columns.columns import Columns
from quantine.kernels.columns.reference import fit_if_first
from quantine.kernels.columns.triton.programs.run import round_run
from quantine.kernels.fit.grid_cost import SMALLEST_DIVISOR

ROWS: Final = 8
"""Rows of a program, which is one warp."""


def round_block(columns: Columns, start: int, stop: int) -> None:
    """See `quantine.kernels.columns.round_block`; groups must not run along outputs.

    Grids are fitted by PyTorch when a run of columns begins that share them, for all rows at once.
    The run is then rounded in one launch, and a matrix product corrects the rest of the block.
    """
    at_reach = columns.at_reach
    length = stop - start if at_reach is None else at_reach.fitted.length
    begin = start
    while begin < stop:
        end = min(stop, (begin // length + 1) * length if at_reach else stop)
        if at_reach is not None:
            fit_if_first(columns, at_reach, begin)
        _round_run(columns, begin, end)
        if end < stop:
            behind = columns.weights[end:stop]
            behind.addmm_(columns.upper[begin:end, end:stop].T, columns.errors[begin:end], alpha=-1)
        begin = end


def _round_run(columns: Columns, start: int, stop: int) -> None:
    inputs, rows = columns.weights.shape
    round_run[(triton.cdiv(rows, ROWS),)](
        columns.weights,
        columns.upper,
        columns.scales,
        columns.zeros,
        columns.groups,
        columns.codes,
        columns.errors,
        None if columns.kept is None else columns.kept.view(torch.int8),
        columns.price,
        start,
        stop - start,
        rows,
        inputs,
        BITS=columns.bits,
        ROWS=ROWS,
        WIDTH=triton.next_power_of_2(stop - start),
        SMALLEST=SMALLEST_DIVISOR,
        num_warps=1,
    )
