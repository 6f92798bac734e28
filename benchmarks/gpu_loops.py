"""Column loops and fits for gpu_compile.py to compile, of the kinds that presets run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from quantine.core.grid import Grid
from quantine.core.spec import QuantSpec
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.columns.triton import columns as column_loop
from quantine.kernels.columns.triton.programs.block import round_block
from quantine.kernels.columns.triton.programs.coupled import round_coupled
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost
from quantine.kernels.fit.triton import groups as matrix_fit
from quantine.kernels.fit.triton.programs.matrix import fit_matrix

ROWS, INPUTS = 256, 256
"""Shape of the matrices: programs do not depend on it."""


@dataclass(frozen=True)
class Loop:
    """A block of the column loop to compile: the groups that are fitted in it, and outliers.

    ``length`` is 0 where grids are known before the loop.
    """

    spec: QuantSpec
    cost: GridCost
    length: int

    @property
    def name(self) -> str:
        spec = self.spec
        if not self.length:
            return f"column loop, {spec.bits} bits, known grids"
        statistics = f", second grids of {spec.stat_group_size} rows" if spec.second_level else ""
        outliers = ", outliers" if self.cost.price < math.inf else ""
        return (
            f"column loop, {spec.bits} bits, groups of {self.length} {spec.group_axis}puts "
            f"by {self.cost.clip}{statistics}{outliers}"
        )

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """The program, its operands in order, and what is fixed when it is compiled."""
        rows, inputs, device = ROWS, INPUTS, torch.device("cpu")
        spec, fitting, upper = self.spec, None, torch.eye(inputs)
        groups = torch.zeros(inputs, dtype=torch.int64)
        if self.length:
            if spec.group_axis == "out":
                second = Grid(torch.ones(inputs, rows // self.length), torch.zeros(1, 1), 3, 1)
                fitted = FittedGroups.of_columns(inputs, rows, spec, (second, None), device)
            else:
                fitted = FittedGroups.empty(inputs // self.length, rows, self.length, spec, device)
            fitting = AtReach(fitted, upper.diagonal().clone(), self.cost)
        weight, values = torch.zeros(rows, inputs), (torch.ones(1, rows), torch.zeros(1, rows))
        columns = Columns.of(
            weight, upper, groups, spec.bits, values, groups, self.cost.price, fitting
        )
        _, operands, settings = column_loop.launch_of(columns, 0, 128, fitting)
        return round_block, operands, settings


@dataclass(frozen=True)
class Coupled:
    """A column to compile whose rows make up for each other, with outliers."""

    bits: int
    run: int

    @property
    def name(self) -> str:
        return f"column, {self.bits} bits, runs of {self.run} coupled rows, outliers"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """The program, its operands in order, and what is fixed when it is compiled."""
        weight, values = torch.zeros(self.run, INPUTS), (torch.ones(1, self.run),) * 2
        groups, coupling = torch.zeros(INPUTS, dtype=torch.int64), torch.zeros(self.run, self.run)
        columns = Columns.of(weight, torch.eye(INPUTS), groups, self.bits, values, groups, 0.5)
        _, operands, settings = column_loop.coupled_launch_of(columns, coupling, 0)
        return round_coupled, operands, settings


SPQR = GridCost("hessian", 0.5, look_ahead=True)
LOOPS = (
    Loop(QuantSpec(4), GridCost("mse"), 0),
    Loop(QuantSpec(4, 128), GridCost("mse"), 128),
    Loop(QuantSpec(3, 16, scale_bits=3), SPQR, 16),
    Loop(QuantSpec(4, 16, scale_bits=3, stat_group_size=64), SPQR, 16),
    Loop(QuantSpec(3, 16, scale_bits=3, zero_bits=3), GridCost("minmax", 0.2, True), 16),
    Loop(QuantSpec(3, 64, scale_bits=4), SPQR, 64),
    Loop(QuantSpec(3, 64, scale_bits=3, group_axis="out"), SPQR, 64),
    Coupled(3, 768),
)


@dataclass(frozen=True)
class Fit:
    """A fit to compile of all groups of a matrix, which do not change."""

    spec: QuantSpec
    cost: GridCost

    @property
    def name(self) -> str:
        spec = self.spec
        outliers = ", outliers" if self.cost.price < math.inf else ""
        groups = f"groups of {spec.group_size} inputs"
        return f"fit, {spec.bits} bits, {groups} by {self.cost.clip}{outliers}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """The program, its operands in order, and what is fixed when it is compiled."""
        length, device = self.spec.group_size, torch.device("cpu")
        groups = torch.zeros(ROWS, 4 * length).T.unflatten(0, (4, length))
        fitted = FittedGroups.empty(4, ROWS, length, self.spec, device)
        share = matrix_fit.share_of(fitted, self.cost)
        assert share is not None
        spread = torch.ones(4, length)
        _, operands, settings = matrix_fit.launch_of(groups, spread, fitted, self.cost, share)
        return fit_matrix, operands, settings


FITS = (
    Fit(QuantSpec(4), GridCost("mse")),
    Fit(QuantSpec(4, 128), GridCost("minmax")),
    Fit(QuantSpec(4, 1024), GridCost("mse")),
    Fit(QuantSpec(4, 8192), SPQR),
    Fit(QuantSpec(4, 14336), GridCost("mse")),
    Fit(QuantSpec(4, 14336), GridCost("hessian")),
)
