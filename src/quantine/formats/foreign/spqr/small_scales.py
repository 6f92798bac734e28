"""Scales of small weights in the layout ``spqr``, which has no exponents: steps are rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from torch import Tensor

from quantine.core.device import for_float64
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.errors import FormatError

LARGEST_CHANGE: Final = 2.0**-7
"""Share of a matrix, by norms, that rounding the steps of small scales may change. Codes of 3 bits
change about a tenth, to whose square this adds less than one percent."""


def without_exponent(scale: Statistic, exponent: int) -> Statistic:
    """The same scales with ``2**exponent`` in the float16 steps, as far as these have digits."""
    assert isinstance(scale.grid.scale, Tensor)
    steps = (scale.grid.scale.float() * 2.0**exponent).half()
    return replace(scale, grid=replace(scale.grid, scale=steps))


def regridded(qtensor: QTensor, grid: Grid) -> QTensor:
    """``qtensor`` with ``grid``, its own with rounded scales.

    Raises:
        FormatError: its weights change by more than `LARGEST_CHANGE`.
    """
    before = for_float64(qtensor.grid.decode(qtensor.codes))
    after = for_float64(grid.decode(qtensor.codes))
    change = float((after - before).double().norm() / before.double().norm())
    if not change <= LARGEST_CHANGE:
        raise FormatError(
            f"its weights are so small (at most {before.abs().max().item():.2g}) that float16, in "
            f"which the spqr layout holds steps of scales, changes them by {change:.1%}: use sparse"
        )
    return replace(qtensor, grid=grid)
