"""The grids of groups of weights: their ranges, and the rounding of scales and zero points.

Native and reference find the same but for how float32 sums round, which may decide between
candidates that cost the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.spec import QuantSpec
from quantine.kernels import backend
from quantine.kernels.fit import cpu
from quantine.kernels.fit.grid_cost import GridCost
from quantine.kernels.fit.reference import fit_groups_reference


def fit_groups(columns: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost) -> Grid:
    """The grid of groups of weights; see `fit_groups_reference`.

    Args:
        columns: ``[groups, n, lines]`` float32.
        spread: ``d`` of their inputs, float32: ``[groups, n]``, or ``[lines]`` where
            ``spec.group_axis`` is ``"out"``.

    Raises:
        SolverError: a scale does not fit into float16.
    """
    if backend.of(columns, spread) == "native":
        return cpu.fit_groups(columns, spread, spec, cost)
    return fit_groups_reference(columns, spread, spec, cost)


def fit_rows(weight: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost) -> Grid:
    """The grid of groups of consecutive inputs, all of one size or clusters.

    Args:
        weight: ``[out, in]`` float32.
        spread: ``[in]`` float32, see `quantine.kernels.fit.grid_cost`.

    Raises:
        SolverError: a scale does not fit into float16.
    """
    if not spec.clustered:
        length = spec.group_length(weight.shape[1])
        groups = weight.T.unflatten(0, (-1, length))
        return fit_groups(groups, spread.unflatten(0, (-1, length)), spec, cost)
    sizes = spec.cluster_sizes
    fitted = [
        fit_groups(columns.unsqueeze(0), own.unsqueeze(0), spec, cost)
        for columns, own in zip(weight.T.split(sizes), spread.split(sizes), strict=True)
    ]
    zeros = [grid.zero_point for grid in fitted if isinstance(grid.zero_point, Tensor)]
    zero = torch.cat(zeros, 1) if zeros else None
    scale = torch.cat([grid.scale for grid in fitted if isinstance(grid.scale, Tensor)], 1)
    return Grid(scale, zero, spec.bits, spec.group_size, sizes=sizes)
