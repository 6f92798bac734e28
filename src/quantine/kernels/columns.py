"""The column loop of the solvers: the native kernel, else the PyTorch meaning of it.

Matrices are transposed, ``[inputs, rows]``, so that a column of the weight is contiguous. Native
and reference differ only in how float32 sums and multiply-subtracts round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.core import fit
from quantine.core.objective import Objective, positive
from quantine.core.observe import Factor
from quantine.kernels import backend
from quantine.kernels.fit import Fitted, check
from quantine.kernels.threads import pool


@dataclass(frozen=True)
class AtReach:
    """Groups that are fitted when the loop reaches their first column.

    Attributes:
        fitted: takes the grids: of groups of consecutive columns; or of columns, each of which
            holds groups of outputs, where ``group_axis`` of its spec is ``"out"``.
        spread: the diagonal of the factor, ``[inputs]`` float32.
        objective: of the fit.
    """

    fitted: Fitted
    spread: Tensor
    objective: Objective


@dataclass(frozen=True)
class Columns:
    """A matrix whose columns are rounded one after another.

    Attributes:
        weights: ``[inputs, rows]`` float32; each column ends as it was when it was rounded.
        upper: ``[inputs, inputs]`` float32, the factor of the inverse Hessian.
        bits: bits of a code.
        scales, zeros: ``[groups, rows]`` float32; of groups of outputs ``[1, rows]``, room for
            those of the column that is rounded.
        groups: ``[inputs]`` int64, each column's row of ``scales`` and ``zeros``.
        codes: ``[inputs, rows]`` uint8, filled.
        errors: ``[inputs, rows]`` float32, filled: errors divided by the factor's diagonal.
        kept: ``[inputs, rows]`` bool, filled: where weights are kept as outliers; or ``None``.
        price: squared scaled error above which a weight is kept, if float16 is nearer to it; it
            then loses only what float16 rounds off.
        at_reach: how groups are fitted; ``None`` where grids are known.
    """

    weights: Tensor
    upper: Tensor
    bits: int
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    codes: Tensor
    errors: Tensor
    kept: Tensor | None
    price: float
    at_reach: AtReach | None = None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        factor: Factor,
        bits: int,
        values: tuple[Tensor, Tensor],
        groups: Tensor,
        price: float,
        at_reach: AtReach | None = None,
    ) -> Columns:
        """Nothing of ``weight`` ``[rows, inputs]`` rounded yet; ``values`` are scales and zeros."""
        weights = weight.T[factor.order]  # a copy
        return cls(
            weights,
            factor.upper,
            bits,
            *values,
            groups,
            torch.empty(weights.shape, dtype=torch.uint8),
            torch.empty_like(weights),
            torch.zeros(weights.shape, dtype=torch.bool) if price < math.inf else None,
            price,
            at_reach,
        )


def round_block(columns: Columns, start: int, stop: int) -> None:
    """Round columns one by one, feeding each one's error to those behind it up to ``stop``.

    A group that is fitted starts at ``start``, or is whole between the two; its columns have
    received every error before ``start``.

    Raises:
        SolverError: a scale does not fit into float16.
    """
    native = backend.native()
    if native is None:
        round_block_reference(columns, start, stop)
        return
    found = columns.at_reach
    misfit = native.round_block(
        columns.weights,
        columns.upper,
        columns.groups,
        columns.scales,
        columns.zeros,
        columns.codes,
        columns.errors,
        None if columns.kept is None else columns.kept.view(torch.uint8),
        columns.bits,
        columns.price,
        start,
        stop,
        found and found.fitted.native(native, found.spread, found.objective),
        pool(),
    )
    check(misfit)


def round_block_reference(columns: Columns, start: int, stop: int) -> None:
    """The meaning of `round_block`."""
    for j in range(start, stop):
        if columns.at_reach is not None:
            _fit_if_first(columns, columns.at_reach, j)
        _round_column(columns, j)
        behind = columns.weights[j + 1 : stop]
        behind.addr_(columns.upper[j, j + 1 : stop], columns.errors[j], alpha=-1)


def _fit_if_first(columns: Columns, at_reach: AtReach, j: int) -> None:
    """Fit the group whose first column is ``j``, if there is one, or the groups of column ``j``."""
    fitted = at_reach.fitted
    if fitted.spec.group_axis == "out":
        _fit_column(columns, at_reach, j)
    elif j % fitted.length == 0:
        members = slice(j, j + fitted.length)
        weights, spread = columns.weights[members], at_reach.spread[members]
        grid = fit.fit_groups(
            weights.unsqueeze(0), spread.unsqueeze(0), fitted.spec, at_reach.objective
        )
        fitted.put(j // fitted.length, grid)


def _fit_column(columns: Columns, at_reach: AtReach, j: int) -> None:
    fitted = at_reach.fitted
    groups = columns.weights[j].unflatten(0, (-1, fitted.length))
    grid = fit.fit_groups(
        groups.T.unsqueeze(0),
        at_reach.spread[j].expand(len(groups)),
        fitted.spec,
        at_reach.objective,
        fitted.second(j),
    )
    fitted.put(j, grid)
    columns.scales[0] = fitted.scale.values[j].repeat_interleave(fitted.length)
    columns.zeros[0] = fitted.zero.values[j].repeat_interleave(fitted.length)


def _round_column(columns: Columns, j: int) -> None:
    group, diagonal = int(columns.groups[j]), float(columns.upper[j, j])
    column, scale, zero = columns.weights[j], positive(columns.scales[group]), columns.zeros[group]
    code = torch.div(column, scale).add_(zero).round_().clamp_(0, 2**columns.bits - 1)
    columns.codes[j] = code
    decoded = code.sub_(zero).mul_(scale)
    error = torch.sub(column, decoded, out=columns.errors[j]).div_(diagonal)
    if columns.kept is not None:
        lost = (column - column.half().float()).div_(diagonal)
        better = lost.abs() < error.abs()  # also false where float16 overflows
        kept = torch.logical_and(error.square() > columns.price, better, out=columns.kept[j])
        error.copy_(torch.where(kept, lost, error))
