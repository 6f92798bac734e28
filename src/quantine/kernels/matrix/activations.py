"""Activations as the kernels of `quantine.kernels.matrix.triton` read them, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.kernels.matrix.unit_matrix import UnitMatrix
from quantine.kernels.matrix.units import PAIRS, UNIT

LARGEST: Final = 3
"""Activations of a row are divided by a power of two so that the largest is below 2 to this. Sums of
16 products with codes of 8 bits then stay below 2**14, far from the largest float16."""


@dataclass(frozen=True)
class Arranged:
    """Rows of activations in the order of a matrix's units.

    Attributes:
        words: ``[batch, 16, units]`` int32: word ``p`` of a unit holds its activations ``p`` (low
            half) and ``16 + p`` (high half) as float16, divided by the row's factor.
        sums: ``[batch, planes, groups]`` float32: sums of the divided activations over each run of
            columns that shares statistics.
        factors: ``[batch]`` float32, powers of two.
    """

    words: Tensor
    sums: Tensor
    factors: Tensor


def arrange_reference(x: Tensor, matrix: UnitMatrix) -> Arranged:
    """Arrange ``x`` ``[batch, columns]`` of any float dtype for ``matrix``."""
    stored = x.float() if matrix.source is None else x.float()[:, matrix.source.long()]
    factors = row_factors(stored)
    halves = x.new_zeros(len(x), matrix.units * UNIT, dtype=torch.float16)
    halves[:, : matrix.columns] = (stored / factors.unsqueeze(1)).half()
    pairs = halves.view(len(x), matrix.units, 2, PAIRS).permute(0, 3, 1, 2).contiguous()
    planes = max(1, UNIT // matrix.span)
    sums = halves.float().view(len(x), -1, planes, matrix.span).sum(3).transpose(1, 2)
    return Arranged(pairs.view(torch.int32).squeeze(3), sums.contiguous(), factors)


def row_factors(x: Tensor) -> Tensor:
    """The power of two for each row ``[batch, columns]`` float32; 1 for rows of zeros."""
    largest = x.abs().amax(1)
    exponent = torch.frexp(largest).exponent
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent - LARGEST), 1.0)
