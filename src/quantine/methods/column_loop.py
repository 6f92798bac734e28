"""Rounding with error feedback: the column loop that GPTQ and SpQR share.

Columns are rounded one after another; the error of a column is made up for by the columns still to
come, weighted by the inverse Hessian of the layer's input (GPTQ, arXiv 2210.17323, equations 2 and
3, in the Cholesky form of section 3.3). Updates inside a block of columns are applied at once,
those to the columns behind it in one matrix product (section 3.2).

A weight whose loss exceeds a price is an outlier: it is kept in 16 bit and loses only what float16
rounds off (SpQR, arXiv 2306.03078, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.permute import input_order, inverse
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.errors import PlanError, SolverError, shown
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.fit import fit_rows
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost
from quantine.methods.column_blocks import result, round_columns
from quantine.methods.output_groups import solve_output_groups
from quantine.statistics.hessian import Hessian
from quantine.statistics.inverse_factor import InverseFactor

Groups = Literal["static", "aligned", "refit"]
"""Name of a way to make groups and fit their grids, see `GROUPS`."""
GROUPS: Final[tuple[Groups, ...]] = ("static", "aligned", "refit")
"""How groups of weights are made, and when their grids are fitted.

``"static"``: groups of consecutive inputs, with grids fitted to the original weights before the
loop. ``"aligned"``: groups of consecutive inputs, rounded one group after another; a grid is fitted
when the loop reaches its group. ``"refit"``: groups of inputs that are neighbours in solving order,
also fitted when the loop reaches them; that order is stored with the layer unless it is the order
of the inputs.

Groups of outputs (`quantine.core.spec.QuantSpec.group_axis`) lie within one column each. Whichever
value is chosen, they are fitted when the loop reaches them, see `quantine.methods.output_groups`.
"""


@dataclass(frozen=True)
class ColumnLoop:
    """The parameters of the column loop: the order of columns, their groups, and damping.

    Attributes:
        groups: how groups are made and when their grids are fitted, see `GROUPS`.
        act_order: whether the inputs with the largest second moment are rounded first.
        damp: damping, as a share of the Hessian's mean diagonal, above 0 and at most 1; see
            `quantine.statistics.inverse_factor.factorize`.
        block_size: number of columns per lazy update; affects speed only, up to float rounding.

    Raises:
        PlanError: a field has a value that is not allowed.
    """

    groups: Groups
    act_order: bool
    damp: float
    block_size: int

    def __post_init__(self) -> None:
        check_choice("groups", self.groups, GROUPS)
        if not 0 < self.damp <= 1:
            raise PlanError(f"damp must be above 0 and at most 1, not {shown(self.damp)}")
        if self.block_size < 1:
            raise PlanError(f"block_size must be positive, not {shown(self.block_size)}")

    def stores_order(self, spec: QuantSpec) -> bool:
        """Whether groups consist of inputs in act-order, which is then stored with the layer."""
        return self.act_order and self.groups == "refit" and spec.group_axis == "in"

    def factor(self, hessian: Hessian | None, spec: QuantSpec) -> InverseFactor:
        """The triangular factor of the inverse Hessian, with inputs in solving order.

        Args:
            hessian: statistics of the matrix's input.
            spec: the grid to quantize on, whose groups may limit the order.

        Raises:
            SolverError: there is no Hessian, or it cannot be factored.
        """
        seen, order = self._ordered(hessian, spec)
        return replace(seen.factor(self.damp, order), coupling=seen.coupling)

    def spread(self, hessian: Hessian | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The diagonal of `factor`, and its order: all that predictions need, in half of the time.

        Arguments and errors are those of `factor`.
        """
        seen, order = self._ordered(hessian, spec)
        return seen.spread(self.damp, order), order

    def _ordered(self, hessian: Hessian | None, spec: QuantSpec) -> tuple[Hessian, Tensor]:
        """The Hessian, which there must be, and the inputs in solving order."""
        if hessian is None or hessian.tokens == 0:
            raise SolverError("error feedback needs calibration inputs, but none were observed")
        diagonal = hessian.matrix.diagonal()
        together = self._together(spec, len(diagonal))
        return hessian, input_order(diagonal, self.act_order, together)

    def _together(self, spec: QuantSpec, inputs: int) -> int | None:
        """Number of consecutive inputs that act-order keeps together; ``None`` where it is free."""
        aligned = self.groups == "aligned" and spec.group_axis == "in"
        return spec.group_length(inputs) if aligned else None

    def solve(
        self, weight: Tensor, factor: InverseFactor, spec: QuantSpec, cost: GridCost
    ) -> QTensor:
        """Quantize one matrix with error feedback.

        Args:
            weight: ``[out, in]`` float32; it is not modified.
            factor: the result of `factor` for the matrix's input.
            spec: the grid to quantize on.
            cost: how candidate grids are compared. Its ``price`` is the loss, ``error**2 / d**2``,
                above which a weight is kept as an outlier; ``d`` is the entry of the factor's
                diagonal for the weight's input.

        Raises:
            SolverError: a scale does not fit into float16.
        """
        if spec.group_axis == "out":
            return solve_output_groups(weight, factor, spec, cost, self.block_size)
        order, length = factor.order, spec.group_length(weight.shape[1])
        spread = factor.upper.diagonal().contiguous()
        if self.groups == "static":
            grid = fit_rows(weight, spread[inverse(order)], spec, cost)
            mirrored = grid.scales() < 0 if spec.signed else None
            values = _positive(grid, mirrored)
            groups = _groups_of(spec, order)
            columns = Columns.of(
                weight,
                factor.upper,
                order,
                grid.bits,
                values,
                groups,
                cost.price,
                coupling=factor.coupling,
            )
            round_columns(columns, 1, self.block_size)
            found = result(columns, grid, inverse(order), None)
            return found if mirrored is None else _mirrored(found, mirrored)
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
            factor.coupling,
        )
        round_columns(columns, length, self.block_size)
        if self.groups == "refit":
            return result(columns, fitted.grid(), None, order if self.stores_order(spec) else None)
        places = inverse(order[::length] // length)
        return result(columns, fitted.grid(places), inverse(order), None)


def _positive(grid: Grid, mirrored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``[groups, rows]`` as kernels take them: all scales positive.

    A grid of negative scale has the values of one with the opposite scale, from the last code to
    the first.

    Args:
        mirrored: ``[rows, groups]``: where scales are negative; ``None`` is nowhere.
    """
    scales, zeros = grid.scales(), grid.zeros()
    if mirrored is not None:
        scales = scales.abs()
        zeros = torch.where(mirrored, 2**grid.bits - 1 - zeros, zeros)
    return scales.T.contiguous(), zeros.T.contiguous()


def _mirrored(found: QTensor, mirrored: Tensor) -> QTensor:
    """``found`` with the codes of some groups ``[rows, groups]`` counted from the last."""
    groups = found.codes.unflatten(1, (mirrored.shape[1], -1))
    codes = torch.where(mirrored.unsqueeze(2), 2**found.grid.bits - 1 - groups, groups)
    return replace(found, codes=codes.flatten(1))


def _groups_of(spec: QuantSpec, inputs: Tensor) -> Tensor:
    """The number of the group of each of ``inputs``, ``[in]`` int64 as ``inputs`` are."""
    if not spec.clustered:
        return inputs // spec.group_length(len(inputs))
    sizes = torch.tensor(spec.cluster_sizes, dtype=torch.int64, device=inputs.device)
    return torch.arange(len(sizes), device=inputs.device).repeat_interleave(sizes)[inputs]
