"""The native grid of rounded inputs, with which integers are multiplied."""

from __future__ import annotations

from typing import Any

from torch import nn

from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.core.overrides import is_overridden
from quantine.core.qtensor import QTensor
from quantine.kernels import integer
from quantine.kernels.integer.input_grid import InputGrid


def native_input_grid(inputs: nn.Module | None, qtensor: QTensor) -> Any:
    """The native grid of the inputs of ``qtensor``, or ``None`` where floats are multiplied.

    They have to be where inputs are rounded by anything else than a plain grid, where kernels do
    not multiply the matrix in integers, and where a group of weights spans several clusters.
    """
    if not isinstance(inputs, StaticGrid | TokenGrid):
        return None
    if type(inputs) not in (StaticGrid, TokenGrid) or is_overridden(inputs):
        return None
    if not integer.multiplies_integers(qtensor):
        return None
    grid: InputGrid | None = InputGrid(inputs.bits)
    if isinstance(inputs, StaticGrid):
        channels = inputs.of_channels()
        grid = InputGrid.of_channels(inputs.bits, *channels, qtensor, inputs.reached())
    return None if grid is None else integer.native_grid(grid)
