"""Products of a packed matrix with many rows of activations, by tensor cores.

A program computes a tile of the result. It decodes the codes of a few units of its rows in
registers, makes weights of them in float16, and hands them to the tensor cores, which sum in
float32; the matrix is never in memory as floats. Sums are in one order, so results are the same
whenever a program runs. For more rows than that pays for, see `multiply_decoded`.

The meaning is `quantine.kernels.matrix.reference.multiply_reference` (``exact``), with weights and
activations rounded to float16.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.matrix.triton import instructions
from quantine.kernels.matrix.triton.programs.tiles import decode_tiles, multiply_tiles
from quantine.kernels.matrix.triton.warps import REGISTERS
from quantine.kernels.matrix.units.activations import Rows
from quantine.kernels.matrix.units.instructions import unit_codes
from quantine.kernels.matrix.units.statistics import RowGroups
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix

OUTPUTS: Final = 64
"""Rows of the matrix that a program multiplies."""
MOST: Final = 64
"""Largest number of rows of activations that a program multiplies."""
LEAST: Final = 16
"""Smallest number, those included that are not there: tensor cores take no fewer."""
DECODED: Final = 4
"""Units that a program decodes at once: 128 inputs. A thread reads 8 bytes of each word."""
WIDE: Final = 8
"""The same where registers hold them, so that a thread reads 16 bytes of each word."""
PANEL: Final = 2**26
"""Weights that are decoded into memory at once where PyTorch multiplies: 128 MiB of 16 bits."""
OUTLIERS: Final = 32
"""Outliers that a program reads at once."""


def multiply(matrix: UnitMatrix, x: Rows, dtype: torch.dtype) -> Tensor:
    """``x @ W.T`` ``[batch, rows]`` in ``dtype``."""
    result = torch.empty(len(x.halves), matrix.rows, dtype=dtype, device=x.halves.device)
    kernel, operands, settings = launch_of(matrix, x, result)
    grid = (triton.cdiv(matrix.rows, OUTPUTS), triton.cdiv(len(x.halves), settings["BATCH"]))
    with backend.launching(result):
        kernel[grid](*operands, **settings)
    return result


def multiply_decoded(matrix: UnitMatrix, x: Tensor) -> Tensor:
    """``x @ W.T`` by PyTorch, which gets the matrix as floats, at most `PANEL` at once.

    Args:
        matrix: the matrix ``W`` ``[out, in]``.
        x: ``[batch, in]`` float32, float16 or bfloat16.
    """
    lines = max(OUTPUTS, PANEL // matrix.columns // OUTPUTS * OUTPUTS)
    starts = range(0, matrix.rows, lines)
    parts = [x @ decode(matrix, x.dtype, first, first + lines).T for first in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def decode(
    matrix: UnitMatrix, dtype: torch.dtype, first: int = 0, stop: int | None = None
) -> Tensor:
    """Rows ``first`` to ``stop`` of the matrix in ``dtype``, columns in the order of inputs.

    Weights are rounded to float16 on the way, outliers of ``matrix`` are added to them.
    """
    stop = matrix.rows if stop is None else min(stop, matrix.rows)
    # The last line takes the outliers of other rows: nobody waits to know which they are.
    lines = torch.empty(stop - first + 1, matrix.columns, dtype=dtype, device=matrix.words.device)
    result = lines[:-1]
    program, operands, settings = decoding_of(matrix, result, first)
    grid = (triton.cdiv(len(result), OUTPUTS), triton.cdiv(matrix.units, settings["WIDTH"]))
    with backend.launching(result):
        program[grid](*operands, **settings)
    if matrix.entries is not None:
        rows, columns, added = matrix.entries.placed(matrix)
        rows = torch.where((rows >= first) & (rows < stop), rows - first, stop - first)
        more = lines[rows, columns].float() + added * matrix.multiplier
        lines[rows, columns] = more.to(dtype)
    return result


def decoding_of(
    matrix: UnitMatrix, result: Tensor, first: int
) -> tuple[Any, list[Any], dict[str, Any]]:
    """As `launch_of`, the program that decodes rows from ``first`` on, without their outliers."""
    operands, settings = _matrix_of(matrix, wide=True)
    settings |= instructions.settings(decode_tiles, UNIT=unit_codes(matrix.bits))
    more = [matrix.multiplier, matrix.source, result]
    more += [matrix.rows, first, first + len(result), matrix.columns]
    return decode_tiles, [*operands, *more], settings


def launch_of(matrix: UnitMatrix, x: Rows, result: Tensor) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program for ``matrix``, its operands in order, and what is fixed when it is compiled."""
    entries, batch = matrix.entries, LEAST
    while batch < min(MOST, len(x.halves)):
        batch *= 2
    wide = batch == LEAST and isinstance(matrix.groups, RowGroups)
    operands, settings = _matrix_of(matrix, wide)
    if wide:
        settings["maxnreg"] = REGISTERS
    settings |= {"BATCH": batch, "PROGRAM": matrix.program, "CHUNK": OUTLIERS}
    settings |= instructions.settings(multiply_tiles, UNIT=unit_codes(matrix.bits))
    of_outliers: list[Tensor | None] = [None, None, None]
    if entries is not None:
        of_outliers = [entries.words, entries.rows, entries.bounds]
    of_x = [x.halves, x.factors, len(x.halves)]
    return (
        multiply_tiles,
        [*operands, *of_outliers, *of_x, matrix.multiplier, result, matrix.rows],
        settings,
    )


def _matrix_of(matrix: UnitMatrix, wide: bool) -> tuple[list[Any], dict[str, Any]]:
    """What programs need to decode ``matrix``: first operands, and settings.

    ``wide`` asks for `WIDE` units at once, where rows are of so many.
    """
    groups = matrix.groups
    wide = wide and matrix.units % WIDE == 0
    settings: dict[str, Any] = {
        "BITS": matrix.bits,
        "UNITS": matrix.units,
        "ROWS": OUTPUTS,
        "WIDTH": WIDE if wide else DECODED,
        "num_warps": 4,
        "num_stages": 2 if wide else 3,  # eight units on their way from memory, either way
    }
    if isinstance(groups, RowGroups):
        settings |= {
            "ALONG_OUTPUTS": False,
            "SIZE": groups.tile,
            "SPAN": groups.span,
            "PLANES": groups.planes,
            "SCALE_BITS": groups.scale_bits,
            "ZERO_BITS": groups.zero_bits,
        }
        grids = [groups.scale_grids, groups.zero_grids]
        return [matrix.words, groups.words, *grids, groups.factors], settings
    settings |= {"ALONG_OUTPUTS": True, "SIZE": groups.size}
    settings |= {"SPAN": 32, "PLANES": 1, "SCALE_BITS": 16, "ZERO_BITS": 0}
    settings["num_stages"] = 2  # each stage holds the scales of all its weights
    return [matrix.words, groups.scales, groups.zeros, None, groups.factors], settings
