"""A matrix while its columns are rounded one after another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost


@dataclass(frozen=True)
class AtReach:
    """Groups that are fitted when the loop reaches their first column.

    Attributes:
        fitted: takes the grids: of groups of consecutive columns; or of columns, each of which
            holds groups of outputs, where ``group_axis`` of its spec is ``"out"``.
        spread: the diagonal of the factor, ``[inputs]`` float32.
        cost: what a wrong grid costs.
    """

    fitted: FittedGroups
    spread: Tensor
    cost: GridCost


@dataclass(frozen=True)
class Columns:
    """A matrix whose columns are rounded one after another.

    Attributes:
        weights: ``[inputs, rows]`` float32; each column ends as it was when it was rounded.
        upper: ``[inputs, inputs]`` float32, the factor of the inverse Hessian.
        bits: bits of a code.
        scales, zeros: ``[groups, rows]`` float32; of groups of outputs ``[1, rows]``, room for
            those of the column that is rounded.
        groups: ``[inputs]`` int64, each column's row of ``scales`` and ``zeros``.
        codes: ``[inputs, rows]`` uint8, filled.
        errors: ``[inputs, rows]`` float32, filled: errors divided by the factor's diagonal.
        kept: ``[inputs, rows]`` bool, filled: where weights are kept as outliers; or ``None``.
        price: squared scaled error above which a weight is kept, if float16 is nearer to it; it
            then loses only what float16 rounds off.
        at_reach: how groups are fitted; ``None`` where grids are known.
    """

    weights: Tensor
    upper: Tensor
    bits: int
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    codes: Tensor
    errors: Tensor
    kept: Tensor | None
    price: float
    at_reach: AtReach | None = None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        upper: Tensor,
        order: Tensor,
        bits: int,
        values: tuple[Tensor, Tensor],
        groups: Tensor,
        price: float,
        at_reach: AtReach | None = None,
    ) -> Columns:
        """Nothing of ``weight`` ``[rows, inputs]`` rounded yet.

        Args:
            upper: see `Columns`.
            order: ``[inputs]`` int64: column ``j`` is input ``order[j]``.
            values: scales and zeros, see `Columns`.
        """
        weights = weight.T[order]  # a copy
        keeps = price < math.inf
        return cls(
            weights,
            upper,
            bits,
            *values,
            groups,
            torch.empty_like(weights, dtype=torch.uint8),
            torch.empty_like(weights),
            torch.zeros_like(weights, dtype=torch.bool) if keeps else None,
            price,
            at_reach,
        )
