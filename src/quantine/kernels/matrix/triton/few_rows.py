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
from quantine.kernels.matrix.triton.programs.column_groups_several import (
    multiply_column_groups_several,
)
from quantine.kernels.matrix.triton.programs.row_groups import multiply_row_groups
from quantine.kernels.matrix.triton.warps import LANES, REGISTERS, outliers_at_once, warps_of
from quantine.kernels.matrix.units.activations import Arranged
from quantine.kernels.matrix.units.instructions import (
    PAIR_TIMES_PAIR,
    pairs_product,
    unit_product,
)
from quantine.kernels.matrix.units.layout import TOGETHER
from quantine.kernels.matrix.units.statistics import RowGroups
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix

FEW: Final = 4
"""Largest number of rows of activations that are multiplied so."""
BLOCK: Final = 4
"""Rows of the matrix, of those of a program, that are decoded at once."""
TIGHT_BLOCK: Final = 2
"""The same where registers would not hold the sums of so many, one for each row of activations."""
WHOLE: Final = 4
"""Largest number of bits of codes whose words registers hold beside the sums of `BLOCK` rows."""


def multiply(matrix: UnitMatrix, x: Arranged, dtype: torch.dtype) -> Tensor:
    """``x @ W.T`` ``[batch, rows]`` in ``dtype``."""
    result = torch.empty(len(x.words), matrix.rows, dtype=dtype, device=x.words.device)
    program, operands, settings = launch_of(matrix, x, result, len(x.words))
    with backend.launching(result):
        program[(_programs_of(matrix, len(x.words)),)](*operands, **settings)
    return result


def _programs_of(matrix: UnitMatrix, batch: int) -> int:
    """How many programs multiply ``batch`` rows of activations."""
    programs: int = triton.cdiv(matrix.rows, matrix.program)
    return programs if batch == 1 else programs * (matrix.program // _block(matrix, batch))


def launch_of(
    matrix: UnitMatrix, x: Arranged, result: Tensor, batch: int
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program for ``matrix``, its operands in order, and what is fixed when it is compiled.

    Args:
        matrix, x: what is multiplied.
        result: what it fills.
        batch: number of rows of activations that a program multiplies.
    """
    entries = matrix.entries
    kernel, of_groups, settings = _of_groups(matrix, x, batch)
    warps, block = warps_of(matrix.units), _block(matrix, batch)
    together = matrix.program if batch == 1 else block * batch
    settings |= {
        "BITS": matrix.bits,
        "UNITS": matrix.units,
        "ROWS": matrix.program,
        "BLOCK": block,
        "WIDTH": warps * LANES * TOGETHER,
        "CHUNK": outliers_at_once(warps, together),
        "num_warps": warps,
    }
    if batch == 1:
        settings |= instructions.settings(kernel, UNIT=unit_product(matrix.bits))
    else:
        settings |= instructions.of_pairs(kernel, matrix.bits)
    of_outliers: list[Tensor | None] = [None, None, None]
    if entries is not None:
        of_outliers = [entries.words, entries.rows, entries.bounds]
    of_x = [x.words, x.words.view(torch.float16), x.factors]
    operands = [matrix.words, *of_groups, *of_outliers, *of_x, matrix.multiplier, result]
    return kernel, [*operands, matrix.rows], settings


def _block(matrix: UnitMatrix, batch: int) -> int:
    """Rows of the matrix that are decoded at once; with several rows of activations, by a program.

    One row of activations along inputs takes all rows of a program.
    """
    if batch == 1 and isinstance(matrix.groups, RowGroups):
        return matrix.program
    tight = batch > 1 and matrix.bits > WHOLE
    tight |= batch > 2 and isinstance(matrix.groups, RowGroups)
    return min(TIGHT_BLOCK if tight else BLOCK, matrix.program)


def _of_groups(
    matrix: UnitMatrix, x: Arranged, batch: int
) -> tuple[Any, list[Tensor | None], dict[str, Any]]:
    """The program, the operands that its groups need, and what of its settings they decide."""
    groups = matrix.groups
    if isinstance(groups, RowGroups):
        settings: dict[str, Any] = {
            "BATCH": batch,
            "TILE": groups.tile,
            "SPAN": groups.span,
            "PLANES": groups.planes,
            "SCALE_BITS": groups.scale_bits,
            "ZERO_BITS": groups.zero_bits,
        }
        if batch > 1 and matrix.bits > WHOLE and warps_of(matrix.units) == 1:
            settings["maxnreg"] = REGISTERS
        operands = [groups.words, groups.scale_grids, groups.zero_grids, x.sums]
        return multiply_row_groups, operands, settings
    operands = [groups.scales, groups.zeros, groups.factors]
    if batch > 1:
        settings = {"BATCH": batch, "SIZE": groups.size}
        if batch == FEW and matrix.bits > WHOLE and warps_of(matrix.units) == 1:
            settings["maxnreg"] = REGISTERS
        return multiply_column_groups_several, operands, settings
    settings = {"SIZE": groups.size, "maxnreg": REGISTERS}
    settings |= instructions.settings(
        multiply_column_groups, SUM=pairs_product(), PAIR=PAIR_TIMES_PAIR
    )
    return multiply_column_groups, operands, settings
