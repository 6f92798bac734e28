"""Products of a packed matrix with few rows of activations: as fast as the codes can be read.

A program multiplies a few whole rows of the matrix, so nothing is split, nothing has to be summed
between programs, and results do not depend on the order in which programs run. Activations are read
once for all rows of the program. See docs/gpu.md.

The meaning is `quantine.kernels.matrix.reference.multiply_reference` (``exact``), to the precision
of float16: products of 16 codes are summed in float16, everything else in float32.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.matrix.triton import instructions
from quantine.kernels.matrix.triton.programs.column_groups import multiply_column_groups
from quantine.kernels.matrix.triton.programs.row_groups import multiply_row_groups
from quantine.kernels.matrix.triton.warps import LANES, REGISTERS, outliers_at_once, warps_of
from quantine.kernels.matrix.units.activations import Arranged
from quantine.kernels.matrix.units.instructions import (
    PAIR_TIMES_PAIR,
    pairs_product,
    unit_product,
)
from quantine.kernels.matrix.units.layout import TOGETHER
from quantine.kernels.matrix.units.statistics import ColumnGroups, RowGroups
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix

FEW: Final = 4
"""Largest number of rows of activations that are multiplied so."""
BLOCK: Final = 4
"""Rows that a program of groups along outputs multiplies at once."""


def multiply(matrix: UnitMatrix, x: Arranged, dtype: torch.dtype) -> Tensor:
    """``x @ W.T`` ``[batch, rows]`` in ``dtype``."""
    result = torch.empty(len(x.words), matrix.rows, dtype=dtype, device=x.words.device)
    program, operands, settings = launch_of(matrix, x, result)
    programs = triton.cdiv(matrix.rows, matrix.program)
    if isinstance(matrix.groups, ColumnGroups):
        programs *= len(x.words)
    with backend.launching(result):
        program[(programs,)](*operands, **settings)
    return result


def launch_of(
    matrix: UnitMatrix, x: Arranged, result: Tensor
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program for ``matrix``, its operands in order, and what is fixed when it is compiled."""
    entries, groups = matrix.entries, matrix.groups
    warps = warps_of(matrix.units)
    settings: dict[str, Any] = {
        "BITS": matrix.bits,
        "UNITS": matrix.units,
        "ROWS": matrix.program,
        "WIDTH": warps * LANES * TOGETHER,
        "CHUNK": outliers_at_once(warps, matrix.program),
        "num_warps": warps,
    }
    of_outliers: list[Tensor | None] = [None, None, None]
    if entries is not None:
        of_outliers = [entries.words, entries.rows, entries.bounds]
    of_x = [x.words, x.words.view(torch.float16), x.factors]
    if isinstance(groups, RowGroups):
        kernel: Any = multiply_row_groups
        of_batch = []
        of_groups: list[Any] = [groups.words, groups.scale_grids, groups.zero_grids, x.sums]
        settings |= {
            "BATCH": len(x.words),
            "TILE": groups.tile,
            "SPAN": groups.span,
            "PLANES": groups.planes,
            "SCALE_BITS": groups.scale_bits,
            "ZERO_BITS": groups.zero_bits,
        }
    else:
        assert isinstance(groups, ColumnGroups)
        kernel = multiply_column_groups
        of_batch = [len(x.words)]
        of_groups = [groups.scales, groups.zeros, groups.factors]
        settings |= {"SIZE": groups.size, "BLOCK": min(BLOCK, matrix.program)}
        settings["maxnreg"] = REGISTERS
        settings |= instructions.settings(kernel, SUM=pairs_product(), PAIR=PAIR_TIMES_PAIR)
    settings |= instructions.settings(kernel, UNIT=unit_product(matrix.bits))
    operands = [
        matrix.words,
        *of_groups,
        *of_outliers,
        *of_x,
        matrix.multiplier,
        result,
        matrix.rows,
        *of_batch,
    ]
    return kernel, operands, settings
