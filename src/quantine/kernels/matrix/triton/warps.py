"""How a program for few rows of activations shares out a row of the matrix."""

from __future__ import annotations

from typing import Final

from quantine.kernels.matrix.units.layout import TOGETHER

LANES: Final = 32
"""Threads of a warp."""
MOST_WARPS: Final = 8
"""Warps of a program where rows are long."""
REGISTERS: Final = 255
"""Registers that a thread may take of programs that say so. Left alone, the compiler stops before,
and spills the rest, so that more programs fit on a multiprocessor."""
SUMS: Final = 32
"""Sums of outliers that a thread holds at most: one for each that it reads, row of the matrix and
row of activations."""


def warps_of(units: int) -> int:
    """Warps of a program, a power of two, where a row has so many units."""
    warps = 1
    while warps < MOST_WARPS and warps * LANES * TOGETHER < units:
        warps *= 2
    return warps


def outliers_at_once(warps: int, rows: int) -> int:
    """Outliers that a program reads at once: ``rows`` of the matrix times those of activations.

    A thread reads up to 8, but never the 4 that it has of units: tensors of equal shapes get one
    layout, and outliers would move between threads.
    """
    return warps * LANES * (2 * TOGETHER if rows * 2 * TOGETHER <= SUMS else TOGETHER // 2)
