"""Products of a packed matrix with few rows of rounded activations, by sums of four byte products.

A program multiplies a few whole rows of the matrix, as in `quantine.kernels.matrix.triton`. Codes
are multiplied as bytes without a sign, four by an instruction, and summed in integers over the
neighbouring units that are of one group; the scales of weights and activations follow in float32.

The meaning is `quantine.kernels.integer.reference.multiply_reference`.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.integer.triton.programs.few_rows import multiply_few
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix
from quantine.kernels.integer.units.inputs import Rounded
from quantine.kernels.matrix.triton.warps import LANES, REGISTERS, outliers_at_once, warps_of
from quantine.kernels.matrix.units.layout import TOGETHER

FEW: Final = 4
"""Largest number of rows of activations that are multiplied so."""
AT_ONCE: Final = 2
"""Rows of activations that meet the same decoded codes, where registers hold them."""
COSTLIEST: Final = 5
"""Bits of codes whose decoding takes the most registers: one row of activations at once."""
FOUR_PRODUCTS: Final = "dp4a.u32.s32 $0, $1, $2, $3;"
"""The instruction that adds four products of bytes, those of weights without a sign."""


def multiply(matrix: GriddedMatrix, x: Rounded, dtype: torch.dtype) -> Tensor:
    """``x @ W.T`` ``[batch, rows]`` in ``dtype``, for codes of ``x`` in quads."""
    result = torch.empty(len(x.codes), matrix.rows, dtype=dtype, device=x.codes.device)
    program, operands, settings = launch_of(matrix, x, result)
    with backend.launching(result):
        program[(triton.cdiv(matrix.rows, matrix.program),)](*operands, **settings)
    return result


def launch_of(
    matrix: GriddedMatrix, x: Rounded, result: Tensor
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program for ``matrix``, its operands in order, and what is fixed when it is compiled."""
    warps = warps_of(matrix.units)
    settings: dict[str, Any] = {
        "BITS": matrix.bits,
        "UNITS": matrix.units,
        "BATCH": len(x.codes),
        "EACH": 1 if matrix.bits == COSTLIEST else min(AT_ONCE, len(x.codes)),
        "ROWS": matrix.program,
        "WIDTH": warps * LANES * TOGETHER,
        "COMMON": matrix.common,
        "CHUNK": outliers_at_once(warps, matrix.program),
        "TEXT": FOUR_PRODUCTS if isinstance(multiply_few, triton.JITFunction) else "",
        "num_warps": warps,
    }
    if len(x.codes) > 1:
        settings["maxnreg"] = REGISTERS
    of_x = [x.codes, x.codes.view(torch.int8), x.sums, x.scale, x.shift]
    operands = [matrix.words, matrix.scale, matrix.zero, matrix.groups, matrix.base]
    operands += [*matrix.outliers(), matrix.inputs.scale, *of_x]
    return multiply_few, [*operands, result, matrix.rows, matrix.scale.shape[1]], settings
