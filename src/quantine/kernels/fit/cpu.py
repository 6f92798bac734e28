"""`quantine.kernels.fit` by the native extension: tensors are on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.spec import QuantSpec
from quantine.kernels import backend
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost
from quantine.kernels.fit.misfit import raise_misfit
from quantine.kernels.threads import pool


def fit_groups(columns: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost) -> Grid:
    """See `quantine.kernels.fit.fit_groups`."""
    groups, length, lines = columns.shape
    fitted = FittedGroups.empty(groups, lines, length, spec, columns.device)
    native = fitter(fitted, spread.flatten(), cost)
    flat = columns.flatten(0, 1).contiguous()
    raise_misfit(backend.extension().fit_groups(flat, native, pool()))
    return fitted.grid()


def fitter(fitted: FittedGroups, spread: Tensor, cost: GridCost) -> Any:
    """The ``quantine._native.Fitter`` that writes the grids it fits into ``fitted``.

    Args:
        fitted: room for all groups.
        spread: ``d`` of `GridCost`, float32: ``[inputs]``, or ``[lines]`` where groups run along
            outputs.
        cost: the rounding error that is minimized.
    """
    spec, arrays = fitted.spec, []
    for one in (fitted.scale, fitted.zero):
        arrays += [one.values, one.codes, one.step, one.zero]
    return backend.extension().Fitter(
        spec.bits,
        spec.sym,
        spec.scale_bits,
        spec.zero_bits,
        fitted.run,
        cost.clip,
        cost.price,
        cost.leaves_out,
        fitted.given,
        fitted.length,
        spec.group_axis == "out",
        spread.contiguous(),
        *arrays,
    )
