"""Solving matrices whose weights are too small for statistics in float16.

Float16 holds no number below ``2**-24``, and below ``2**-14`` each halving costs it a digit. So
small weights are multiplied by a power of two, solved, and divided by it again, which loses
nothing: the grid keeps the exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec

LEAST_SCALE: Final = 2.0**-15
"""Scale below which weights are multiplied: float16 rounds it by up to ``2**-10`` of it."""
LEAST_CODED_SCALE: Final = 2.0**-12
"""The same where scales or zero points have second grids: a step is a small part of a scale."""
TOP: Final = 12
"""Weights are multiplied so that the largest lies between ``2**(TOP - 1)`` and ``2**TOP``. Error
feedback and ranges of few codes may exceed that; float16 ends at ``2**16``."""
NEGLIGIBLE: Final = 2.0**-21
"""Magnitude of a row or column, as a share of the largest in its matrix, below which its scales may
lose digits: what float16 then rounds off is less than ``2**-30`` of the largest weight."""
LARGEST_FACTOR: Final = 120
"""Exponent of the largest factor, so that its inverse is still a normal float32."""


def solve_multiplied(
    weight: Tensor, spec: QuantSpec, solve: Callable[[Tensor], QTensor]
) -> QTensor:
    """Solve ``weight``, or a multiple of it where its scales would be too small for float16.

    Args:
        weight: ``[out, in]`` float32; it is not modified.
        spec: the grid to quantize on.
        solve: quantizes the matrix that it gets; a multiple must give the same multiple.
    """
    exponent = exponent_of(weight, spec)
    if not exponent:
        return solve(weight)
    return _divided(solve(weight * 2.0**-exponent), exponent)


def exponent_of(weight: Tensor, spec: QuantSpec) -> int:
    """The exponent that the grid of ``weight`` needs, negative; 0 where float16 holds its scales.

    Every row and every column must have a scale that float16 holds, but for those that are
    `NEGLIGIBLE`. In a row or column, smaller groups beside a larger one may lose digits.

    Args:
        weight: ``[out, in]`` float32.
        spec: the grid to quantize on.
    """
    if spec.blocked:
        return 0  # other engines know no exponent: the fit rounds to what float16 has
    magnitudes = weight.abs()
    lines = torch.cat([magnitudes.amax(0), magnitudes.amax(1)])
    largest = float(lines.max())
    if not 0 < largest < math.inf:
        return 0
    smallest = float(lines[lines >= largest * NEGLIGIBLE].min())
    coded = spec.second_level or spec.zero_bits > 0
    if smallest >= (LEAST_CODED_SCALE if coded else LEAST_SCALE) * (2**spec.bits - 1):
        return 0
    return min(0, max(math.frexp(largest)[1] - TOP, -LARGEST_FACTOR))


def _divided(solved: QTensor, exponent: int) -> QTensor:
    """``solved`` with every weight multiplied by ``2**exponent``."""
    outliers = solved.outliers
    if outliers is not None:
        outliers = replace(outliers, values=outliers.values.float() * 2.0**exponent)
    return replace(solved, grid=replace(solved.grid, exponent=exponent), outliers=outliers)
