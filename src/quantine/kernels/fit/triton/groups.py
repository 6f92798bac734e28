"""The fit of all groups of a matrix on a GPU, in one launch."""

from __future__ import annotations

from typing import Any, Final

import triton
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.spec import QuantSpec
from quantine.kernels import backend
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost
from quantine.kernels.fit.reference import fit_groups_reference
from quantine.kernels.fit.triton.programs.matrix import fit_matrix
from quantine.kernels.fit.triton.request import Request, Share, operands, run_of

LARGEST_TILE: Final = 2**13
"""Most places of a tile, which is held in registers."""
LONGEST_ROW: Final = 2**14
"""The same of a single row whose range leaves out no likely outliers, which takes fewer."""


def fit_groups(columns: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost) -> Grid:
    """See `quantine.kernels.fit.fit_groups`; tiles that registers do not hold go to PyTorch."""
    groups, length, lines = columns.shape
    fitted = FittedGroups.empty(groups, lines, length, spec, columns.device)
    share = share_of(fitted, cost)
    if share is None:
        return fit_groups_reference(columns, spread, spec, cost)
    grid, values, settings = launch_of(columns, spread, fitted, cost, share)
    with backend.launching(columns):
        fit_matrix[grid](*values, **settings)
    fitted.check()
    return fitted.grid()


def share_of(fitted: FittedGroups, cost: GridCost) -> Share | None:
    """The lines of a program; ``None`` where registers do not hold what is fitted together."""
    width, most = int(triton.next_power_of_2(fitted.length)), LARGEST_TILE
    if LARGEST_TILE < width <= LONGEST_ROW and not (cost.leaves_out or fitted.spec.second_level):
        most = LONGEST_ROW
    lines = most // width
    return Share.of(run_of(fitted.spec, fitted.run, lines), fitted.length, most)


def launch_of(
    columns: Tensor, spread: Tensor, fitted: FittedGroups, cost: GridCost, share: Share
) -> tuple[tuple[int], list[Any], dict[str, Any]]:
    """Number of programs, their operands in order, and what is fixed when they are compiled.

    Args:
        columns, spread, cost: as for `fit_groups`.
        fitted: room for the grids.
        share: the lines of a program.
    """
    groups, length, lines = columns.shape
    values = [
        columns,
        spread.contiguous(),
        *operands(fitted),
        cost.price,
        lines,
        fitted.scale.step.shape[1],
        *columns.stride(),
    ]
    settings = {
        "LENGTH": length,
        "WIDTH": triton.next_power_of_2(length),
        "OF_LINES": spread.ndim == 1,
        "FIT": Request.of(fitted, cost),
        "RUNS": share.runs,
        "SPAN": share.span,
        "RUN": share.run,
        "num_warps": share.warps,
    }
    return (groups * share.programs(lines),), values, settings
