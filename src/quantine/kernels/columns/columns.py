"""The state of a matrix in GPTQ's column loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost


@dataclass(frozen=True)
class AtReach:
    """How grids are fitted inside of the loop, to weights that earlier errors have changed.

    Attributes:
        fitted: the grids fitted so far. Its groups are consecutive columns, fitted when the loop
            reaches their first one; or, where its spec has ``group_axis`` ``"out"``, each column
            counts as one group, whose lines are the column's groups of outputs.
        spread: diagonal of the inverse Hessian's factor, ``[inputs]`` float32, in the order of the
            loop.
        cost: the rounding error that a grid is chosen to minimize.
    """

    fitted: FittedGroups
    spread: Tensor
    cost: GridCost


@dataclass(frozen=True)
class Columns:
    """A matrix whose columns are rounded one after another.

    Columns are in the order of the loop. The loop changes the tensors in place.

    Attributes:
        weights: ``[inputs, rows]`` float32. Errors of earlier columns are subtracted from the
            columns to come; a rounded column stays as it was just before it was rounded.
        upper: ``[inputs, inputs]`` float32, the upper triangular Cholesky factor of the inverse
            Hessian.
        bits: number of bits of one code, 2 to 8.
        scales, zeros: ``[groups, rows]`` float32, scales and zero points. Where groups run along
            outputs ``[1, rows]``: those of the column being rounded, overwritten by the next.
        groups: ``[inputs]`` int64, for each column the row of ``scales`` and ``zeros`` it uses.
        codes: ``[inputs, rows]`` uint8, written column by column.
        errors: ``[inputs, rows]`` float32, written column by column: the rounding error divided by
            the diagonal of ``upper``, which is what feedback multiplies.
        kept: ``[inputs, rows]`` bool, written column by column: whether a weight is an outlier that
            is kept in 16 bit; ``None`` where no outliers are kept.
        price: threshold of outliers: a weight is kept if its squared entry of ``errors`` is larger
            and float16 is nearer to the weight than its code. Its error is then that of float16.
        at_reach: how groups are fitted in the loop; ``None`` where all grids were fitted before.
        coupling: ``[rows, run]`` float32: rows make up for each other in runs of ``run``, from the
            last to the first. Entry ``[i, k]`` is what an error of row ``i``, the rounded value
            less the weight, takes off row ``k`` of its run before that one is rounded; it counts
            for ``k`` before ``i`` only, and means something else elsewhere, see
            `quantine.statistics.output_covariance.OutputCovariance.coupling`. ``None`` where rows
            are independent of one another.
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
    coupling: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The matrix, its grids, and what is written, in the order of the attributes."""
        grids = self.scales, self.zeros, self.groups
        return self.weights, self.upper, *grids, self.codes, self.errors, self.kept

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
        coupling: Tensor | None = None,
    ) -> Columns:
        """The state before the first column is rounded.

        Args:
            weight: ``[rows, inputs]`` float32, which is copied.
            order: ``[inputs]`` int64, the order of the loop: column ``j`` is input ``order[j]``.
            values: the attributes ``scales`` and ``zeros``.
            price: threshold of outliers; infinite for no outliers.
            upper, bits, groups, at_reach, coupling: the attributes of these names.
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
            coupling,
        )
