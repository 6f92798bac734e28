"""`quantine.kernels.integer` by the native extension: tensors are on the CPU."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.kernels import backend
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.token_factors import steepness
from quantine.kernels.matrix.cpu import Matrix
from quantine.kernels.threads import pool

SCALAR: Final = "scalar"
"""Name of the instruction set in `levels` that every processor has: plain C++."""


def multiplies_integers(qtensor: QTensor) -> bool:
    """See `quantine.kernels.integer.multiplies_integers`; where ``qtensor`` is is not checked."""
    if qtensor.grid.axis != "in" or levels() == [SCALAR]:
        return False
    longest = max(qtensor.grid.lengths(qtensor.codes.shape[1]))
    return longest <= int(backend.extension().LONGEST_GROUP)


def native_grid(grid: InputGrid) -> Any:
    """See `quantine.kernels.integer.native_grid`."""
    made = backend.extension().InputGrid
    if grid.scale is None or grid.zero is None:
        return made(grid.bits)
    scale, zero = grid.scale.contiguous(), grid.zero.contiguous()
    if grid.reach is None:
        return made(grid.bits, scale, zero)
    return made(grid.bits, scale, zero, *steepness(scale, zero, grid.bits, grid.reach))


def levels() -> list[str]:
    """See `quantine.kernels.integer.levels`."""
    return list(backend.extension().integer_levels())


def multiply(matrix: Matrix, grid: Any, x: Tensor, level: str) -> Tensor:
    """See `quantine.kernels.integer.multiply`; ``level`` is always given."""
    result = x.new_empty(len(x), matrix.rows)
    backend.extension().multiply_integer(matrix, grid, x, result, level, pool())
    return result


def input_codes(matrix: Matrix, grid: Any, x: Tensor) -> Tensor:
    """See `quantine.kernels.integer.input_codes`."""
    codes = torch.empty_like(x, dtype=torch.uint8)
    backend.extension().integer_codes(matrix, grid, x, codes, pool())
    return codes
