"""Rounding with error feedback, the column loop of every method that has one.

Columns are rounded one after another; what a column loses is made up by the columns still to
come, weighted by the inverse Hessian of the layer's input (GPTQ, arXiv 2210.17323, equations 2
and 3, in the Cholesky form of section 3.3). Updates inside a block of columns are applied at once,
those to the columns behind it in one matrix product (section 3.2).

A column's weight whose loss exceeds a price is an outlier: it is kept in 16 bit and loses only what
float16 rounds off (SpQR, arXiv 2306.03078, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.core.permute import input_order, inverse
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.errors import PlanError, SolverError
from quantine.kernels.columns import round_block
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.fit import fit_rows
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost
from quantine.methods.column_blocks import blocks, feed_back, result
from quantine.methods.output_groups import solve_output_groups
from quantine.statistics.hessian import Hessian
from quantine.statistics.inverse_factor import InverseFactor

Groups = Literal["static", "aligned", "refit"]
GROUPS: Final[tuple[Groups, ...]] = ("static", "aligned", "refit")
"""How groups are made, and when their grids are fitted.

``"static"``: of consecutive inputs; grids are fitted to the original weights before the loop.
``"aligned"``: of consecutive inputs, rounded one group after another; a grid is
fitted when the loop reaches it. ``"refit"``: of inputs in solving order, likewise; that order is
stored with the layer unless it is the inputs' own.

Groups of outputs (`QuantSpec.group_axis`) lie within a column each: whatever this says, they are
fitted when the loop reaches it, see `quantine.methods.output_groups`.
"""


@dataclass(frozen=True)
class ColumnLoop:
    """How columns are ordered and rounded.

    Attributes:
        groups: see `GROUPS`.
        act_order: strongest inputs first.
        damp: see `quantine.statistics.inverse_factor.factorize`.
        block_size: columns per lazy update; affects speed only, up to float rounding.
    """

    groups: Groups
    act_order: bool
    damp: float
    block_size: int

    def __post_init__(self) -> None:
        check_choice("groups", self.groups, GROUPS)
        if not 0 < self.damp <= 1:
            raise PlanError(f"damp must be above 0 and at most 1, not {self.damp!r}")
        if self.block_size < 1:
            raise PlanError(f"block_size must be positive, not {self.block_size!r}")

    def stores_order(self, spec: QuantSpec) -> bool:
        """Whether groups are made of inputs in an order of their own."""
        return self.act_order and self.groups == "refit" and spec.group_axis == "in"

    def factor(self, hessian: Hessian | None, spec: QuantSpec) -> InverseFactor:
        """The factor of ``hessian`` in the order of the loop.

        Raises:
            SolverError: there is no Hessian, or it cannot be factored.
        """
        if hessian is None or hessian.tokens == 0:
            raise SolverError("error feedback needs calibration inputs, but none were observed")
        diagonal = hessian.matrix.diagonal()
        together = self._together(spec, len(diagonal))
        return hessian.factor(self.damp, input_order(diagonal, self.act_order, together))

    def _together(self, spec: QuantSpec, inputs: int) -> int | None:
        """Consecutive inputs that are rounded one after another; ``None`` where order is free."""
        aligned = self.groups == "aligned" and spec.group_axis == "in"
        return spec.group_length(inputs) if aligned else None

    def solve(
        self, weight: Tensor, factor: InverseFactor, spec: QuantSpec, cost: GridCost
    ) -> QTensor:
        """Round ``weight`` ``[out, in]`` float32.

        Args:
            cost: of grids; its price is the loss, ``error**2 / d**2``, above which a weight
                is kept as an outlier.

        Raises:
            SolverError: a scale does not fit into float16.
        """
        if spec.group_axis == "out":
            return solve_output_groups(weight, factor, spec, cost, self.block_size)
        order, length = factor.order, spec.group_length(weight.shape[1])
        spread = factor.upper.diagonal().contiguous()
        if self.groups == "static":
            grid = fit_rows(weight, spread[inverse(order)], spec, cost)
            values = grid.scales().T.contiguous(), grid.zeros().T.contiguous()
            groups = _groups_of(spec, order)
            columns = Columns.of(weight, factor.upper, order, grid.bits, values, groups, cost.price)
            self._round(columns, length=1)
            return result(columns, grid, inverse(order), None)
        count = len(order) // length
        fitted = FittedGroups.empty(count, len(weight), length, spec, weight.device)
        columns = Columns.of(
            weight,
            factor.upper,
            order,
            spec.bits,
            (fitted.scale.values, fitted.zero.values),
            torch.arange(len(order), device=order.device) // length,
            cost.price,
            AtReach(fitted, spread, cost),
        )
        self._round(columns, length)
        if self.groups == "refit":
            return result(columns, fitted.grid(), None, order if self.stores_order(spec) else None)
        places = inverse(order[::length] // length)
        return result(columns, fitted.grid(places), inverse(order), None)

    def _round(self, columns: Columns, length: int) -> None:
        for start, stop in blocks(len(columns.weights), length, self.block_size):
            round_block(columns, start, stop)
            feed_back(columns, start, stop)


def _groups_of(spec: QuantSpec, inputs: Tensor) -> Tensor:
    """The group of each of ``inputs``, int64 both."""
    if not spec.clustered:
        return inputs // spec.group_length(len(inputs))
    sizes = torch.tensor(spec.cluster_sizes, device=inputs.device)
    return torch.arange(len(sizes), device=inputs.device).repeat_interleave(sizes)[inputs]
