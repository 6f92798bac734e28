"""The grid of rounded inputs, with which kernels multiply integers."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn

from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.core.overrides import is_overridden
from quantine.core.qtensor import QTensor
from quantine.kernels import backend, integer
from quantine.kernels.integer.input_grid import InputGrid


def is_plain_grid(inputs: nn.Module | None) -> TypeGuard[StaticGrid | TokenGrid]:
    """Whether ``inputs`` rounds as its class says, and so as kernels do."""
    if inputs is None or type(inputs) not in (StaticGrid, TokenGrid):
        return False
    return not is_overridden(inputs)


def integer_grid(inputs: nn.Module | None, qtensor: QTensor) -> Any:
    """What rounded inputs are multiplied with in integers, or ``None`` where floats have to be.

    They have to be where inputs are rounded by anything else than a plain grid, where kernels do
    not multiply the matrix in integers, and where a group of weights spans several clusters.

    Args:
        inputs: rounds the inputs of the matrix; its tensors are on the device of ``qtensor``.
        qtensor: the matrix.

    Returns:
        On the CPU the native grid for `quantine.kernels.integer.multiply`. On a GPU with programs a
        `GriddedMatrix`, which holds the matrix, too.
    """
    if not is_plain_grid(inputs):
        return None
    on_gpu = backend.of(qtensor.codes) == "triton"
    if not on_gpu and not integer.multiplies_integers(qtensor):
        return None
    grid: InputGrid | None = InputGrid(inputs.bits)
    if isinstance(inputs, StaticGrid):
        channels = inputs.of_channels()
        grid = InputGrid.of_channels(inputs.bits, *channels, qtensor, inputs.reached())
    if grid is None:
        return None
    return integer.gridded_matrix(qtensor, grid) if on_gpu else integer.native_grid(grid)
