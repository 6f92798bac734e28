"""How a program for few rows of activations shares out a row of the matrix."""

from __future__ import annotations

from typing import Final

from quantine.kernels.matrix.units.layout import TOGETHER

LANES: Final = 32
"""Threads of a warp."""
MOST_WARPS: Final = 8
"""Warps of a program where rows are long."""
CHUNK: Final = 128
"""Outliers that a program reads at once."""


def warps_of(units: int) -> int:
    """Warps of a program, a power of two, where a row has so many units."""
    warps = 1
    while warps < MOST_WARPS and warps * LANES * TOGETHER < units:
        warps *= 2
    return warps
