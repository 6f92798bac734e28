"""A block of the column loop on a GPU, in one launch: none for a column or a group."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.columns.reference import fit_if_first, round_block_reference
from quantine.kernels.columns.triton.programs.block import round_block as program
from quantine.kernels.columns.triton.programs.coupled import round_coupled as coupled_program
from quantine.kernels.fit.triton.request import LEAST_LINES, Request, Share, operands, run_of

PART: Final = 16
"""Columns in registers at a time, where no groups of them are fitted that say how many."""


def round_block(columns: Columns, start: int, stop: int) -> None:
    """See `quantine.kernels.columns.round_block`.

    A program has some rows and goes through the block part by part: it takes the errors of the
    block's earlier columns off a part, fits the part's group, and rounds its columns one by one,
    all in registers. PyTorch fits groups that are longer than the block, and where registers do not
    hold what must be fitted together (`share_of`).

    What does not fit into float16 is only noted, since asking would wait for the GPU:
    `FittedGroups.check` raises the error.

    Coupled rows are rounded by a launch for each column, and their groups fitted by PyTorch.
    """
    if columns.coupling is not None:
        _round_coupled(columns, columns.coupling, start, stop)
        return
    at_reach = columns.at_reach
    outputs = at_reach is not None and at_reach.fitted.spec.group_axis == "out"
    too_long = at_reach is not None and not outputs and at_reach.fitted.length > stop - start
    if share_of(at_reach) is not None and not too_long:
        _launch(columns, start, stop, at_reach)
    elif at_reach is None or outputs:
        round_block_reference(columns, start, stop)
    else:
        _round_by_groups(columns, at_reach, start, stop)


def _round_coupled(columns: Columns, coupling: Tensor, start: int, stop: int) -> None:
    """Round a block whose rows make up for each other, column by column."""
    for j in range(start, stop):
        if columns.at_reach is not None:
            fit_if_first(columns, columns.at_reach, j)
        runs, values, settings = coupled_launch_of(columns, coupling, j)
        with backend.launching(columns.weights):
            coupled_program[runs](*values, **settings)
        behind = columns.weights[j + 1 : stop]
        behind.addr_(columns.upper[j, j + 1 : stop], columns.errors[j], alpha=-1)


def coupled_launch_of(
    columns: Columns, coupling: Tensor, j: int
) -> tuple[tuple[int], list[Any], dict[str, Any]]:
    """Number of programs for column ``j``, their operands, and what is fixed when compiled."""
    (inputs, rows), run = columns.weights.shape, coupling.shape[1]
    values = [
        *_tensors(columns),
        coupling,
        columns.price,
        j,
        rows,
        inputs,
        run,
    ]
    width = max(triton.next_power_of_2(run), LEAST_LINES)
    settings = {"BITS": columns.bits, "WIDTH": width, "num_warps": min(8, max(1, width // 32))}
    return (triton.cdiv(rows, run),), values, settings


def _tensors(columns: Columns) -> list[Tensor | None]:
    """The matrix and its grids, with which the operands of both programs begin."""
    *others, kept = columns.tensors
    return [*others, None if kept is None else kept.view(torch.int8)]


def share_of(fitting: AtReach | None) -> Share | None:
    """The rows of a program; ``None`` where it cannot hold those that are fitted together.

    Args:
        fitting: how it fits groups, if it does.
    """
    if fitting is None:
        return Share.of(LEAST_LINES, PART)
    fitted = fitting.fitted
    if fitted.spec.group_axis == "out":
        return Share.of(fitted.length, PART)
    return Share.of(run_of(fitted.spec, fitted.run), fitted.length)


def _round_by_groups(columns: Columns, at_reach: AtReach, start: int, stop: int) -> None:
    """Round a block whose groups PyTorch fits: a launch for each group."""
    length = at_reach.fitted.length
    for begin in range(start, stop, length):
        end = min(begin + length, stop)
        fit_if_first(columns, at_reach, begin)
        _launch(columns, begin, end, None)
        behind = columns.weights[end:stop]
        behind.addmm_(columns.upper[begin:end, end:stop].T, columns.errors[begin:end], alpha=-1)


def _launch(columns: Columns, start: int, stop: int, fitting: AtReach | None) -> None:
    if start < stop:
        grid, values, settings = launch_of(columns, start, stop, fitting)
        with backend.launching(columns.weights):
            program[grid](*values, **settings)


def launch_of(
    columns: Columns, start: int, stop: int, fitting: AtReach | None
) -> tuple[tuple[int], list[Any], dict[str, Any]]:
    """Number of programs, their operands in order, and what is fixed when they are compiled.

    Args:
        fitting: how groups are fitted; ``None`` where their grids are known.
    """
    share = share_of(fitting)
    assert share is not None
    inputs, rows = columns.weights.shape
    part, outputs, runs, request = PART, False, 0, None
    of_fit: tuple[Any, ...] = (None,) * 10
    if fitting is not None:
        fitted = fitting.fitted
        outputs, runs = fitted.spec.group_axis == "out", fitted.scale.step.shape[1]
        part = PART if outputs else fitted.length
        request = Request.of(fitted, fitting.cost)
        of_fit = fitting.spread, *operands(fitted)
    values = [
        *_tensors(columns),
        *of_fit,
        columns.price,
        start,
        stop,
        rows,
        inputs,
        runs,
    ]
    settings = {
        "BITS": columns.bits,
        "PART": part,
        "WIDTH": triton.next_power_of_2(part),
        "FIT": request,
        "OUTPUTS": outputs,
        "RUNS": share.runs,
        "SPAN": share.span,
        "RUN": share.run,
        "num_warps": share.warps,
    }
    return (share.programs(rows),), values, settings
