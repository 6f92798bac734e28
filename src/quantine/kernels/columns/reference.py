"""The meaning of `quantine.kernels.columns.round_block`, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.grid import decode, encode
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.fit.grid_cost import positive
from quantine.kernels.fit.reference import fit_groups_reference


def round_block_reference(columns: Columns, start: int, stop: int) -> None:
    """See `quantine.kernels.columns.round_block`."""
    for j in range(start, stop):
        if columns.at_reach is not None:
            fit_if_first(columns, columns.at_reach, j)
        _round_column(columns, j)
        behind = columns.weights[j + 1 : stop]
        behind.addr_(columns.upper[j, j + 1 : stop], columns.errors[j], alpha=-1)


def fit_if_first(columns: Columns, at_reach: AtReach, j: int) -> None:
    """Fit the group that begins at column ``j``, if one does.

    Where groups run along outputs, fit all groups of outputs of column ``j``.
    """
    fitted = at_reach.fitted
    if fitted.spec.group_axis == "out":
        _fit_column(columns, at_reach, j)
    elif j % fitted.length == 0:
        members = slice(j, j + fitted.length)
        weights, spread = columns.weights[members], at_reach.spread[members]
        grid = fit_groups_reference(
            weights.unsqueeze(0), spread.unsqueeze(0), fitted.spec, at_reach.cost
        )
        fitted.put(j // fitted.length, grid)


def _fit_column(columns: Columns, at_reach: AtReach, j: int) -> None:
    fitted = at_reach.fitted
    groups = columns.weights[j].unflatten(0, (-1, fitted.length))
    grid = fit_groups_reference(
        groups.T.unsqueeze(0),
        at_reach.spread[j].expand(len(groups)),
        fitted.spec,
        at_reach.cost,
        fitted.second(j),
    )
    fitted.put(j, grid)
    columns.scales[0] = fitted.scale.values[j].repeat_interleave(fitted.length)
    columns.zeros[0] = fitted.zero.values[j].repeat_interleave(fitted.length)


def _round_column(columns: Columns, j: int) -> None:
    if columns.coupling is None:
        _round_rows(columns, j, slice(None), None)
        return
    run, count = columns.coupling.shape[1], columns.weights.shape[1]
    asked = columns.weights.new_zeros(-(-count // run), run)
    for place in reversed(range(min(run, count))):
        rows = slice(place, None, run)  # this row of every run
        lost = _round_rows(columns, j, rows, asked[:, place])
        asked[: len(lost), :place].addcmul_(
            columns.coupling[rows, :place], lost.unsqueeze(1).expand(-1, place)
        )


def _round_rows(columns: Columns, j: int, rows: slice, asked: Tensor | None) -> Tensor:
    """Round some rows of column ``j``.

    Args:
        asked: what is added to them first, at least as many; ``None`` is nothing.

    Returns:
        The weights before that, less what they are rounded to.
    """
    # Tensors, not numbers: asking a device for its values would wait for it.
    group, diagonal = columns.groups[j : j + 1], columns.upper[j, j]
    column = columns.weights[j, rows]
    before = column
    if asked is not None:
        before = column.clone()
        column += asked[: len(column)]
    scale, zero = positive(columns.scales[group][0, rows]), columns.zeros[group][0, rows]
    codes = encode(column, scale, zero, columns.bits)
    columns.codes[j, rows] = codes
    value = decode(codes, scale, zero)
    if columns.kept is not None:
        half = column.half().float()
        error, lost = (column - value).div_(diagonal), (column - half).div_(diagonal)
        better = lost.abs() < error.abs()  # also false where float16 overflows
        kept = torch.logical_and(error.square() > columns.price, better)
        columns.kept[j, rows] = kept
        value = torch.where(kept, half, value)
    lost = before - value
    columns.errors[j, rows] = lost / diagonal
    return lost
