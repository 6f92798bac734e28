"""The column loop where groups run along outputs (AdaDim, arXiv 2309.15531, section 3).

A group lies within one column, so it is fitted to the weights as error feedback has left them when
the loop reaches it. Columns may come in any order, and none has to be stored. Only a second level
ties columns together: the statistics of a run of inputs share a grid, so a run is fitted when its
first column is reached, and its columns are rounded one after another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.objective import Objective
from quantine.core.observe import Factor
from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.kernels.columns import Columns, round_block
from quantine.kernels.fit import fit_groups
from quantine.methods.rounding import blocks, feed_back, result


def run_length(spec: QuantSpec, inputs: int) -> int:
    """Inputs whose groups are fitted together."""
    return min(spec.stat_group_length(inputs), inputs) if spec.second_level else 1


def solve_output_groups(
    weight: Tensor, factor: Factor, spec: QuantSpec, objective: Objective, block_size: int
) -> QTensor:
    """Round ``weight`` ``[out, in]`` float32.

    Args:
        factor: whose order keeps runs of `run_length` inputs together.
        objective: of grids; its price as of `quantine.methods.columns.ColumnLoop.solve`.
        block_size: columns per lazy update.

    Raises:
        SolverError: a scale does not fit into float16.
    """
    outputs, inputs = weight.shape
    run = run_length(spec, inputs)
    fitted = _Fitted.empty(inputs, spec.group_length(outputs), outputs, run, spec)
    columns = Columns.of(
        weight,
        factor,
        spec.bits,
        (torch.empty(run, outputs), torch.empty(run, outputs)),
        torch.arange(inputs) % run,
        objective.price,
    )
    spread = factor.upper.diagonal().contiguous()
    for start, stop in blocks(inputs, run, block_size):
        for first in range(start, stop, run):
            if first % run == 0:
                fitted.fit(columns, spread, objective, first)
            end = min(first + run, stop)
            round_block(columns, first, end)
            feed_back(columns, first, end, stop)
        feed_back(columns, start, stop)
    places = inverse(factor.order)
    return result(columns, fitted.grid(places, inverse(factor.order[::run] // run)), places, None)


@dataclass(frozen=True)
class _Level:
    """Scales, or zero points, while they are fitted; inputs in solving order.

    Attributes:
        values: ``[in, groups]`` float32.
        codes: ``[groups, in]`` uint8: codes of the values on second grids, where there are some.
        step, zero: ``[groups, runs]`` float32: the second grids.
    """

    values: Tensor
    codes: Tensor
    step: Tensor
    zero: Tensor

    @classmethod
    def empty(cls, inputs: int, groups: int, run: int) -> _Level:
        second = torch.empty(groups, -(-inputs // run))
        codes = torch.empty(groups, inputs, dtype=torch.uint8)
        return cls(torch.empty(inputs, groups), codes, second, second.clone())

    def put(self, first: int, run: int, values: Tensor, stored: Tensor | Statistic | None) -> None:
        """Take ``values`` ``[groups * lines, 1]`` of a run that starts at input ``first``."""
        groups = len(self.codes)
        lines = values.view(groups, -1)
        inputs = slice(first, first + lines.shape[1])
        self.values[inputs] = lines.T
        if isinstance(stored, Statistic):
            self.codes[:, inputs] = stored.codes.view(groups, -1)
            self.step[:, first // run] = stored.grid.scales()[0]
            self.zero[:, first // run] = stored.grid.zeros()[0]

    def stored(self, places: Tensor, runs: Tensor, bits: int, run: int) -> Tensor | Statistic:
        """As a `Grid` holds them: whole zero points (``bits`` 0), float16, or codes."""
        if bits in {0, FLOAT16}:
            return self.values[places].to(torch.float16 if bits else torch.uint8)
        second = Grid(self.step[:, runs].half(), self.zero[:, runs].half(), bits, run)
        return Statistic(self.codes[:, places], second)


@dataclass(frozen=True)
class _Fitted:
    """The grids of a matrix's columns, which are fitted run after run."""

    spec: QuantSpec
    length: int
    run: int
    scale: _Level
    zero: _Level

    @classmethod
    def empty(cls, inputs: int, length: int, outputs: int, run: int, spec: QuantSpec) -> _Fitted:
        """Room for the groups of ``length`` outputs of all inputs."""
        levels = (_Level.empty(inputs, outputs // length, run) for _ in range(2))
        return cls(spec, length, run, *levels)

    def fit(self, columns: Columns, spread: Tensor, objective: Objective, first: int) -> None:
        """Fit the run of inputs that starts at ``first``, and put its grids into ``columns``."""
        weights = columns.weights[first : first + self.run]
        inputs, groups = len(weights), weights.shape[1] // self.length
        # Every group of every input is a line of one problem; the lines of a run are neighbours.
        lines = weights.unflatten(1, (groups, self.length)).permute(2, 1, 0).flatten(1)
        grid = fit_groups(
            lines.unsqueeze(0),
            spread[first : first + inputs].repeat(groups),
            replace(self.spec, group_size=self.length, stat_group_size=inputs),
            objective,
        )
        self.scale.put(first, self.run, grid.scales(), grid.scale)
        self.zero.put(first, self.run, grid.zeros(), grid.zero_point)
        for level, found in ((self.scale, columns.scales), (self.zero, columns.zeros)):
            values = level.values[first : first + inputs]
            found[:inputs] = values.repeat_interleave(self.length, 1)

    def grid(self, places: Tensor, runs: Tensor) -> Grid:
        """The grid of all columns: input ``places[j]`` as number ``j``, runs likewise."""
        spec = self.spec
        zero = None if spec.sym else self.zero.stored(places, runs, spec.zero_bits, self.run)
        scale = self.scale.stored(places, runs, spec.scale_bits, self.run)
        return Grid(scale, zero, spec.bits, self.length, "out")
