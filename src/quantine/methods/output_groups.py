"""The column loop where groups run along outputs (AdaDim, arXiv 2309.15531, section 3).

A group lies within one column, so its grid is fitted when the loop reaches the column, to the
weights as error feedback has changed them. Columns may be solved in any order, and none has to be
stored. Where scales and zero points of neighbouring inputs share second grids, these are fitted to
the original weights before the loop, which then finds only their codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.fit import fit_groups
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost
from quantine.kernels.fit.reference import SecondGrids
from quantine.methods.column_blocks import result, round_columns
from quantine.statistics.inverse_factor import InverseFactor


def solve_output_groups(
    weight: Tensor, factor: InverseFactor, spec: QuantSpec, cost: GridCost, block_size: int
) -> QTensor:
    """Quantize one matrix with error feedback, in groups of outputs.

    Args:
        weight: ``[out, in]`` float32; it is not modified.
        factor: the factor of the inverse Hessian of the matrix's input.
        spec: the grid to quantize on, with ``group_axis`` ``"out"``.
        cost: how candidate grids are compared, with the price of outliers, see
            `quantine.methods.column_loop.ColumnLoop.solve`.
        block_size: number of columns per lazy update.

    Raises:
        SolverError: a scale does not fit into float16.
    """
    outputs, inputs = weight.shape
    spread, places = factor.upper.diagonal().contiguous(), inverse(factor.order)
    second = _second_grids(weight, spread[places], spec, cost)
    fitted = FittedGroups.of_columns(
        inputs,
        outputs,
        spec,
        (_of_columns(second[0], factor), _of_columns(second[1], factor)),
        weight.device,
    )
    columns = Columns.of(
        weight,
        factor.upper,
        factor.order,
        spec.bits,
        (weight.new_empty(1, outputs), weight.new_empty(1, outputs)),
        torch.zeros_like(factor.order),
        cost.price,
        AtReach(fitted, spread, cost),
        factor.coupling,
    )
    round_columns(columns, 1, block_size)
    scale = fitted.scale.in_lines(places, spec.scale_bits, second[0])
    zero = None if spec.sym else fitted.zero.in_lines(places, spec.zero_bits, second[1])
    return result(columns, Grid(scale, zero, spec.bits, fitted.length, "out"), places, None)


def _second_grids(weight: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost) -> SecondGrids:
    """The second grids of scales and zero points ``[groups, in]`` of the original weights.

    Args:
        weight: ``[out, in]`` float32.
        spread: ``[in]`` float32, the diagonal of the factor, in input order as the statistics are.
        spec: the grid to quantize on.
        cost: how candidate grids are compared.

    Returns:
        The grid of scales and that of zero points; ``None`` for a kind that is not stored as codes.
    """
    if not spec.second_level:
        return None, None
    length = spec.group_length(len(weight))
    grid = fit_groups(weight.unflatten(0, (-1, length)), spread, spec, cost)
    scale, zero = grid.scale, grid.zero_point
    return (
        scale.grid if isinstance(scale, Statistic) else None,
        zero.grid if isinstance(zero, Statistic) else None,
    )


def _of_columns(second: Grid | None, factor: InverseFactor) -> Grid | None:
    """The second grid of each single statistic ``[in, groups]``, with inputs in solving order."""
    if second is None:
        return None
    run = second.group_size
    steps, zeros = (
        values.repeat_interleave(run, 1).T[factor.order]
        for values in (second.scales(), second.zeros())
    )
    return Grid(steps, zeros, second.bits, 1)
