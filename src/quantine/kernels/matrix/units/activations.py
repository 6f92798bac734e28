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
"""Activations of a row are divided by a power of two so that the largest is below 2 to this. Sums
of 16 products with codes of 8 bits, less the middle one, then stay at most 2**14, far from the
largest float16."""


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


@dataclass(frozen=True)
class Rows:
    """Rows of activations in stored order.

    Attributes:
        halves: ``[batch, 32 * units]`` float16, divided by the row's factor; zero where they fill
            up the last units.
        factors: ``[batch]`` float32, powers of two.
    """

    halves: Tensor
    factors: Tensor


def arrange_reference(x: Tensor, matrix: UnitMatrix) -> Arranged:
    """Arrange ``x`` ``[batch, columns]`` of any float dtype for ``matrix``."""
    rows, sums = rows_reference(x, matrix), None
    if isinstance(matrix.groups, RowGroups):
        planes, span = matrix.groups.planes, matrix.groups.span
        runs = rows.halves.float().view(len(x), -1, planes, span)
        sums = runs.sum(3).transpose(1, 2).contiguous()
    return Arranged(as_pairs(rows.halves, matrix.units * UNIT), sums, rows.factors)


def rows_reference(x: Tensor, matrix: UnitMatrix) -> Rows:
    """Bring ``x`` ``[batch, columns]`` of any float dtype into the stored order of ``matrix``."""
    stored = x.float() if matrix.source is None else x.float()[:, matrix.source.long()]
    factors = row_factors(stored)
    halves = x.new_zeros(len(x), matrix.units * UNIT, dtype=torch.float16)
    halves[:, : matrix.columns] = stored / factors.unsqueeze(1)
    return Rows(halves, factors)


def row_factors(x: Tensor) -> Tensor:
    """The power of two for each row ``[batch, columns]`` float32.

    It is 1 for rows of zeros, and for those that are not finite.
    """
    largest = x.abs().amax(1)
    factors = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - LARGEST)
    return torch.where((largest > 0) & (largest < torch.inf), factors, 1.0)
