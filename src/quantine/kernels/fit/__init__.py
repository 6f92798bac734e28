"""Fitting the grid of a group of weights: its range, scale and zero point.

Where scales and zero points are quantized themselves (SpQR's second-level statistics), they are
rounded here as well. Native and reference choose the same grids, except that float32 sums round
differently, which may decide between candidates that cost the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.spec import QuantSpec
from quantine.kernels import backend
from quantine.kernels.fit import cpu
from quantine.kernels.fit.block_grids import fit_block_grids
from quantine.kernels.fit.grid_cost import GridCost
from quantine.kernels.fit.reference import fit_groups_reference


def fit_groups(columns: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost) -> Grid:
    """Fit a grid to every group of weights; `fit_groups_reference` says how.

    Signed scales and minima are fitted by `fit_block_grids`, which runs wherever PyTorch does.

    Args:
        columns: ``[groups, n, lines]`` float32: groups of ``n`` weights, in each of the lines.
        spread: ``d`` of `GridCost` for each weight's input, float32: ``[groups, n]``, or
            ``[lines]`` where ``spec.group_axis`` is ``"out"``.
        spec: bits of codes, scales and zero points.
        cost: the rounding error that is minimized.

    Returns:
        A grid with statistics ``[lines, groups]``.

    Raises:
        SolverError: a scale or a zero point does not fit into float16.
    """
    if spec.blocked:
        return fit_block_grids(columns, spread, spec, cost)
    kind = backend.of(columns, spread)
    if kind == "native":
        return cpu.fit_groups(columns, spread, spec, cost)
    if kind == "triton":
        from quantine.kernels.fit.triton import groups

        return groups.fit_groups(columns, spread, spec, cost)
    return fit_groups_reference(columns, spread, spec, cost)


def fit_rows(weight: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost) -> Grid:
    """Fit the grid of a whole matrix whose groups are consecutive inputs of a row.

    Args:
        weight: ``[out, in]`` float32.
        spread: ``[in]`` float32, ``d`` of `GridCost` for each input.
        spec: group sizes, or the sizes of clusters; bits of codes, scales and zero points.
        cost: the rounding error that is minimized.

    Returns:
        A grid with statistics ``[out, groups]``.

    Raises:
        SolverError: a scale or a zero point does not fit into float16.
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
