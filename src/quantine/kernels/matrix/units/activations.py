"""Activations as the kernels of `quantine.kernels.matrix.triton` read them, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.kernels.matrix.units.layout import UNIT
from quantine.kernels.matrix.units.statistics import RowGroups, as_pairs
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix

LARGEST: Final = 3
"""Activations of a row are divided by a power of two so that the largest is below 2 to this. Sums of
16 products with codes of 8 bits, less the middle one, then stay below 2**14, far from the largest
float16."""


@dataclass(frozen=True)
class Arranged:
    """Rows of activations in the order of a matrix's units.

    Attributes:
        words: ``[batch, 16, units]`` int32: word ``p`` of a unit holds its activations ``p`` (low
            half) and ``16 + p`` (high half) as float16, divided by the row's factor.
        sums: ``[batch, planes, groups]`` float32: sums of the divided activations over each run of
            columns that shares statistics; ``None`` where groups run along outputs.
        factors: ``[batch]`` float32, powers of two.
    """

    words: Tensor
    sums: Tensor | None
    factors: Tensor


def arrange_reference(x: Tensor, matrix: UnitMatrix) -> Arranged:
    """Arrange ``x`` ``[batch, columns]`` of any float dtype for ``matrix``."""
    halves, factors = stored_halves(x, matrix)
    sums = None
    if isinstance(matrix.groups, RowGroups):
        planes, span = matrix.groups.planes, matrix.groups.span
        filled = halves.new_zeros(len(x), matrix.units * UNIT, dtype=torch.float32)
        filled[:, : matrix.columns] = halves
        sums = filled.view(len(x), -1, planes, span).sum(3).transpose(1, 2).contiguous()
    return Arranged(as_pairs(halves, matrix.columns), sums, factors)


def stored_halves(x: Tensor, matrix: UnitMatrix) -> tuple[Tensor, Tensor]:
    """``x`` ``[batch, columns]`` in stored order as float16, divided by the returned factors."""
    stored = x.float() if matrix.source is None else x.float()[:, matrix.source.long()]
    factors = row_factors(stored)
    return (stored / factors.unsqueeze(1)).half(), factors


def row_factors(x: Tensor) -> Tensor:
    """The power of two for each row ``[batch, columns]`` float32; 1 for rows of zeros."""
    largest = x.abs().amax(1)
    exponent = torch.frexp(largest).exponent
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent - LARGEST), 1.0)
