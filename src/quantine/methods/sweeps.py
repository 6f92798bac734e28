"""Codes that are chosen once more, when all others are known.

In the column loop a column makes up for the errors of those before it, and knows nothing of those
after it: each rounding is final. A sweep goes through a solved matrix again. It takes a few columns
at a time, moves them to where the error ``tr(G dW H dW.T)`` is least while all others stay, and
rounds them by the column loop from there. A row takes the new codes if its error then becomes
smaller; rows that make up for each other do so together. So a sweep never makes the error larger.

Grids and outliers stay as they are. ``H`` is the damped Hessian of the matrix's input; ``G``, that
of its outputs, is 1 where rows do not make up for each other, see
`quantine.statistics.output_covariance`. Coordinate descent on codes is that of QuantEase (arXiv
2309.01885); here it moves a few columns at once, and sees outputs together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import Grid, decode
from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.errors import PlanError, shown
from quantine.kernels.columns import round_block
from quantine.kernels.columns.columns import Columns
from quantine.kernels.fit.grid_cost import positive
from quantine.statistics.inverse_factor import InverseFactor, invert_upper

TOGETHER: Final = 16
"""Columns that are rounded again at once. Fewer gain a little more and take longer."""
BLOCK: Final = 8 * TOGETHER
"""Columns after which the others learn of what changed."""
FAR: Final = 1024.0
"""Step of the grid that an outlier is given while others are rounded, in units of the largest
weight: nothing else is near, so that it stays where it is, and its error is fed back."""
MOST_SWEEPS: Final = 100
"""Largest number of sweeps that is accepted, far more than any matrix gains from."""


def check_sweeps(sweeps: int) -> None:
    """Raise `PlanError` if a number of sweeps is not from 0 to `MOST_SWEEPS`."""
    if not 0 <= sweeps <= MOST_SWEEPS:
        raise PlanError(f"sweeps must be 0 to {MOST_SWEEPS}, not {shown(sweeps)}")


def swept(
    found: QTensor, weight: Tensor, hessian: Tensor, factor: InverseFactor, sweeps: int
) -> QTensor:
    """Choose codes of a solved matrix once more.

    Args:
        found: the matrix as the column loop left it.
        weight: what it was solved from, ``[out, in]`` float32; it is not modified.
        hessian: ``[in, in]`` float32, the sum of ``x x.T`` that ``factor`` was made of.
        factor: gives the order of inputs, damping, and how rows make up for each other.
        sweeps: how many times all columns are rounded again, alternately neighbours in that order
            and columns from all over it.

    Returns:
        The same matrix with other codes, and an error that is not larger.
    """
    if not sweeps or not len(weight):
        return found
    state = _Sweep.begin(found, weight, hessian, factor)
    for sweep in range(sweeps):
        order = factor.order
        if sweep % 2:
            count = -(-len(order) // TOGETHER)
            order = torch.cat([order[start::count] for start in range(count)])
        for columns in order.split(BLOCK):
            state.round_again(columns)
    return replace(found, codes=state.codes.T.contiguous())


@dataclass(frozen=True)
class _Sweep:
    """A solved matrix, transposed, and its error. Columns are in the order of inputs.

    Attributes:
        values: ``[in, rows]`` float32, the decoded matrix, which changes.
        asked: ``[in, rows]`` float32, ``H @ dW.T``, which changes with it.
        codes: ``[stored columns, rows]`` uint8, which change.
        places: ``[in]`` int64, the stored column of each input.
        scales, zeros: those of groups, as `_values_at` takes them.
        signed: whether some scales are negative.
        groups: ``[stored columns]`` or ``[rows]`` int64, the group of each, see there.
        grid: the grid of the matrix.
        kept: ``[in, rows]`` bool, where outliers are; ``None`` if there are none.
        far: the step of their grids.
        hessian, unit, damp: the Hessian is ``hessian / unit`` with ``damp`` ``[in]`` added.
        coupling: as `quantine.statistics.output_covariance.OutputCovariance` gives it.
        runs: ``[runs, run, run]`` float32, ``L`` of each run of rows; ``None`` without coupling.
        strengths: ``[runs, run]`` float32, its ``D``; ``None`` without coupling.
    """

    values: Tensor
    asked: Tensor
    codes: Tensor
    places: Tensor
    scales: Tensor
    zeros: Tensor
    signed: bool
    groups: Tensor
    grid: Grid
    kept: Tensor | None
    far: float
    hessian: Tensor
    unit: float
    damp: Tensor
    coupling: Tensor | None
    runs: Tensor | None
    strengths: Tensor | None

    @classmethod
    def begin(
        cls, found: QTensor, weight: Tensor, hessian: Tensor, factor: InverseFactor
    ) -> _Sweep:
        """The state before the first sweep, with the arguments of `swept`."""
        grid, coupling = found.grid, factor.coupling
        out_features, inputs = weight.shape
        values = found.dequantize().T.contiguous()
        diagonal = hessian.diagonal()
        damp = torch.where(diagonal == 0, 1.0 + factor.damp, factor.damp)
        unit = diagonal.mean().item() or 1.0
        errors = values - weight.T
        asked = (errors * damp.unsqueeze(1)).addmm_(hessian, errors, alpha=1 / unit)
        del errors
        scales = grid.scales()
        places = torch.arange(inputs, device=weight.device)
        if found.in_perm is not None:
            places = inverse(found.in_perm)
        length = inputs if grid.axis == "in" else out_features
        lengths = torch.tensor(grid.lengths(length), dtype=torch.int64, device=weight.device)
        numbers = torch.arange(len(lengths), device=weight.device)
        kept = None
        if found.outliers is not None:
            marks = torch.zeros_like(found.codes, dtype=torch.bool)
            marks[found.outliers.row_indices(), found.outliers.columns] = True
            kept = marks.T[places]
            del marks
        largest = max(float(bound.abs()) for one in (values, weight) for bound in one.aminmax())
        return cls(
            values,
            asked,
            found.codes.T.contiguous(),
            places,
            scales,
            grid.zeros(),
            bool((scales < 0).any()),
            numbers.repeat_interleave(lengths),
            grid,
            kept,
            FAR * (largest or 1.0),
            hessian,
            unit,
            damp,
            coupling,
            *((None, None) if coupling is None else _in_runs(coupling)),
        )

    def round_again(self, columns: Tensor) -> None:
        """Round some columns again, `TOGETHER` at a time, and let all others know.

        Args:
            columns: their inputs, int64.
        """
        rows = self.hessian[columns] / self.unit
        rows[torch.arange(len(columns), device=rows.device), columns] += self.damp[columns]
        among = rows[:, columns]
        asked, before = self.asked[columns], self.values[columns]
        for start in range(0, len(columns), TOGETHER):
            part = slice(start, start + TOGETHER)
            change = self._changed(columns[part], among[part, part], asked[part])
            if change is not None:
                asked.addmm_(among[:, part], change)
        self.asked.addmm_(rows.T, self.values[columns] - before)

    def _changed(self, columns: Tensor, hessian: Tensor, asked: Tensor) -> Tensor | None:
        """Round a few columns again.

        Args:
            columns: their inputs.
            hessian: the damped Hessian among them.
            asked: their rows of ``H @ dW.T`` as it is now.

        Returns:
            By how much values change, of the shape of ``asked``; ``None`` if they do not.
        """
        upper, failures = hessian.clone(), list[Tensor]()
        invert_upper(upper, failures)
        if any(map(bool, failures)):
            return None
        before = self.values[columns]
        scale, zero, negative = self._values_at(columns)
        block = Columns.of(
            (before - upper.T @ (upper @ asked)).T,
            upper,
            torch.arange(len(columns), device=columns.device),
            self.grid.bits,
            (scale, zero),
            torch.arange(len(columns), device=columns.device),
            math.inf,
            coupling=self.coupling,
        )
        round_block(block, 0, len(columns))
        change = decode(block.codes, positive(scale), zero).sub_(before)
        if self.kept is not None:
            change.masked_fill_(self.kept[columns], 0.0)
        better = self._is_better(change, asked, hessian)
        change.masked_fill_(~better, 0.0)  # also what is no number
        codes, stored = block.codes, self.places[columns]
        if negative is not None:
            codes = torch.where(negative, 2**self.grid.bits - 1 - codes, codes)
        takes = better.expand_as(codes)
        if self.kept is not None:
            takes = takes & ~self.kept[columns]
        self.codes[stored] = torch.where(takes, codes, self.codes[stored])
        self.values[columns] = before + change
        return change

    def _values_at(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales and zero points ``[columns, rows]`` as kernels take them, all scales positive.

        Returns:
            Both, and where scales are negative, so that codes are counted from the last; ``None``
            is nowhere.
        """
        stored = self.places[columns]
        if self.grid.axis == "in":
            chosen = self.groups[stored]
            scale, zero = (one[:, chosen].T.contiguous() for one in (self.scales, self.zeros))
        else:
            scale, zero = (one[stored][:, self.groups] for one in (self.scales, self.zeros))
        negative = scale < 0 if self.signed else None
        if negative is not None:
            scale = scale.abs()
            zero = torch.where(negative, 2**self.grid.bits - 1 - zero, zero)
        if self.kept is not None:
            kept = self.kept[columns]
            zero = torch.where(kept, -self.values[columns] / self.far, zero)
            scale = scale.masked_fill(kept, self.far)
        return scale, zero, negative

    def _is_better(self, change: Tensor, asked: Tensor, hessian: Tensor) -> Tensor:
        """Which rows ``[rows]``, bool, have a smaller error after ``change``."""
        against = (2 * asked).addmm_(hessian, change)
        if self.runs is None or self.strengths is None:
            return (change * against).sum(0) < 0
        count, run = self.runs.shape[:2]
        rows = change.shape[1]
        both = torch.nn.functional.pad(torch.cat([change, against]), (0, count * run - rows))
        changes, others = (both.unflatten(1, (count, run)).transpose(0, 1) @ self.runs).chunk(2, 1)
        gained: Tensor = (changes * others).sum(1).mul_(self.strengths).sum(1)
        return (gained < 0).repeat_interleave(run)[:rows]


def _in_runs(coupling: Tensor) -> tuple[Tensor, Tensor]:
    """``L`` of each run of rows, ``[runs, run, run]``, and its ``D``, ``[runs, run]``."""
    rows, run = coupling.shape
    runs = torch.nn.functional.pad(coupling, (0, 0, 0, -rows % run)).unflatten(0, (-1, run))
    strengths = runs.diagonal(0, 1, 2).clone()
    lower = runs.tril(-1)
    lower.diagonal(0, 1, 2).fill_(1.0)
    return lower, strengths
