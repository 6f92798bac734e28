"""Rounding a matrix once more, into the grid that another engine holds."""

from __future__ import annotations

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.kernels.fit import fit_rows
from quantine.kernels.fit.grid_cost import GridCost


def rounded(weight: Tensor, spec: QuantSpec) -> QTensor:
    """``weight`` ``[out, in]`` float32 on the grid ``spec``, each weight to its nearest code.

    Raises:
        SolverError: a scale does not fit into float16.
    """
    grid = fit_rows(weight, weight.new_ones(weight.shape[1]), spec, GridCost("mse"))
    return QTensor(grid.encode(weight), grid)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference of two matrices, as a share of the norm of ``wanted``."""
    size = float(wanted.double().norm())
    change = float((found.double() - wanted.double()).norm())
    return change / size if size else change
