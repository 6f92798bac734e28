"""Products of a packed matrix with many rows of rounded activations, by tensor cores for bytes.

A program computes a tile of the result. In each turn it decodes some units of its rows to bytes in
registers, which the tensor cores multiply with the codes of activations, and sums the products in
integers; units of a turn are of one group, so that scales then follow in float32. The matrix is
never in memory as bytes.

The meaning is `quantine.kernels.integer.reference.multiply_reference`.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.integer.triton.programs.tiles import multiply_tiles
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix
from quantine.kernels.integer.units.inputs import Rounded

OUTPUTS: Final = 64
"""Rows of the matrix that a program multiplies."""
MOST: Final = 128
"""Largest number of rows of activations that a program multiplies."""
LEAST: Final = 16
"""Smallest number, those included that are not there: tensor cores take no fewer."""
OUTLIERS: Final = 32
"""Outliers that a program reads at once."""


def multiply(matrix: GriddedMatrix, x: Rounded, dtype: torch.dtype) -> Tensor:
    """``x @ W.T`` ``[batch, rows]`` in ``dtype``, for codes of ``x`` in the order of places."""
    result = torch.empty(len(x.codes), matrix.rows, dtype=dtype, device=x.codes.device)
    program, operands, settings = launch_of(matrix, x, result)
    grid = (triton.cdiv(matrix.rows, OUTPUTS), triton.cdiv(len(x.codes), settings["BATCH"]))
    with backend.launching(result):
        program[grid](*operands, **settings)
    return result


def launch_of(
    matrix: GriddedMatrix, x: Rounded, result: Tensor
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program for ``matrix``, its operands in order, and what is fixed when it is compiled."""
    batch, zero = LEAST, matrix.zero
    while batch < min(MOST, len(x.codes)):
        batch *= 2
    settings: dict[str, Any] = {
        "BITS": matrix.bits,
        "UNITS": matrix.units,
        "BATCH": batch,
        "ROWS": OUTPUTS,
        "PROGRAM": matrix.program,
        "WIDTH": matrix.width,
        "COMMON": matrix.common,
        "CHUNK": OUTLIERS,
        "TAKEN_OFF": zero is not None and zero.dtype == torch.uint8 and matrix.bits < 8,
        "num_warps": 4 if batch < MOST else 8,
        "num_stages": 5,
    }
    of_x = [x.codes, x.sums, x.scale, x.shift, len(x.codes)]
    operands: list[Any] = [matrix.words, matrix.scale, zero, matrix.turns, matrix.base]
    operands += [*matrix.outliers(), matrix.inputs.scale, *of_x]
    shape = [matrix.rows, matrix.scale.shape[1], matrix.turns.shape[1]]
    return multiply_tiles, [*operands, result, *shape], settings
