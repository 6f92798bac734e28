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
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import decode
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
    state = _Sweep(found, weight, hessian, factor)
    for sweep in range(sweeps):
        order = factor.order
        if sweep % 2:
            count = -(-len(order) // TOGETHER)
            order = torch.cat([order[start::count] for start in range(count)])
        for columns in order.split(BLOCK):
            state.round_again(columns)
    return replace(found, codes=state.codes.T.contiguous())


class _Sweep:
    """A solved matrix, transposed, and its error, which the arguments of `swept` begin.

    Columns are in the order of inputs, ``[in, rows]``; those of codes as they are stored.
    """

    def __init__(
        self, found: QTensor, weight: Tensor, hessian: Tensor, factor: InverseFactor
    ) -> None:
        self.codes = found.codes.T.contiguous()
        self._grid = grid = found.grid
        self._scales, self._zeros = grid.scales(), grid.zeros()
        self._signed = bool((self._scales < 0).any())
        length = weight.shape[1 if grid.axis == "in" else 0]
        lengths = torch.tensor(grid.lengths(length), dtype=torch.int64, device=weight.device)
        # The group of each stored column, or of each row where groups run along outputs.
        self._groups = torch.arange(len(lengths), device=weight.device).repeat_interleave(lengths)
        self._places = torch.arange(weight.shape[1], device=weight.device)  # of inputs, as stored
        if found.in_perm is not None:
            self._places = inverse(found.in_perm)
        self._values = found.dequantize().T.contiguous()
        largest = max(
            float(bound.abs()) for one in (self._values, weight) for bound in one.aminmax()
        )
        self._far = FAR * (largest or 1.0)
        self._kept = None  # where outliers are
        if found.outliers is not None:
            marks = torch.zeros_like(found.codes, dtype=torch.bool)
            marks[found.outliers.row_indices(), found.outliers.columns] = True
            self._kept = marks.T[self._places]
        diagonal = hessian.diagonal()
        self._hessian, self._unit = hessian, diagonal.mean().item() or 1.0
        self._damp = torch.where(diagonal == 0, 1.0 + factor.damp, factor.damp)
        errors = self._values - weight.T
        self._asked = errors * self._damp.unsqueeze(1)  # the damped H @ dW.T
        self._asked.addmm_(hessian, errors, alpha=1 / self._unit)
        self._coupling = factor.coupling
        self._runs = None if factor.coupling is None else _in_runs(factor.coupling)

    def round_again(self, columns: Tensor) -> None:
        """Round some columns again, `TOGETHER` at a time, and let all others know.

        Args:
            columns: their inputs, int64.
        """
        rows = self._hessian[columns] / self._unit
        rows[torch.arange(len(columns), device=rows.device), columns] += self._damp[columns]
        among = rows[:, columns]
        asked, before = self._asked[columns], self._values[columns]
        for start in range(0, len(columns), TOGETHER):
            part = slice(start, start + TOGETHER)
            change = self._changed(columns[part], among[part, part], asked[part])
            if change is not None:
                asked.addmm_(among[:, part], change)
        self._asked.addmm_(rows.T, self._values[columns] - before)

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
        if any(map(bool, failures)):  # by what float32 rounds off: damped, it is definite
            return None
        before = self._values[columns]
        scale, zero, negative = self._values_at(columns)
        block = Columns.of(
            (before - upper.T @ (upper @ asked)).T,
            upper,
            torch.arange(len(columns), device=columns.device),
            self._grid.bits,
            (scale, zero),
            torch.arange(len(columns), device=columns.device),
            math.inf,
            coupling=self._coupling,
        )
        round_block(block, 0, len(columns))
        change = decode(block.codes, positive(scale), zero).sub_(before)
        if self._kept is not None:
            change.masked_fill_(self._kept[columns], 0.0)
        better = self._is_better(change, asked, hessian)
        change.masked_fill_(~better, 0.0)  # also what is no number
        codes, stored = block.codes, self._places[columns]
        if negative is not None:
            codes = torch.where(negative, 2**self._grid.bits - 1 - codes, codes)
        takes = better.expand_as(codes)
        if self._kept is not None:
            takes = takes & ~self._kept[columns]
        self.codes[stored] = torch.where(takes, codes, self.codes[stored])
        self._values[columns] = before + change
        return change

    def _values_at(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales and zero points ``[columns, rows]`` as kernels take them, all scales positive.

        Returns:
            Both, and where scales are negative, so that codes are counted from the last; ``None``
            is nowhere.
        """
        stored = self._places[columns]
        if self._grid.axis == "in":
            chosen = self._groups[stored]
            scale, zero = (one[:, chosen].T.contiguous() for one in (self._scales, self._zeros))
        else:
            scale, zero = (one[stored][:, self._groups] for one in (self._scales, self._zeros))
        negative = scale < 0 if self._signed else None
        if negative is not None:
            scale = scale.abs()
            zero = torch.where(negative, 2**self._grid.bits - 1 - zero, zero)
        if self._kept is not None:
            kept = self._kept[columns]
            zero = torch.where(kept, -self._values[columns] / self._far, zero)
            scale = scale.masked_fill(kept, self._far)
        return scale, zero, negative

    def _is_better(self, change: Tensor, asked: Tensor, hessian: Tensor) -> Tensor:
        """Which rows ``[rows]``, bool, have a smaller error after ``change``."""
        against = (2 * asked).addmm_(hessian, change)
        if self._runs is None:
            return (change * against).sum(0) < 0
        lower, strengths = self._runs
        count, run = strengths.shape
        rows = change.shape[1]
        both = torch.nn.functional.pad(torch.cat([change, against]), (0, count * run - rows))
        changes, others = (both.unflatten(1, (count, run)).transpose(0, 1) @ lower).chunk(2, 1)
        gained: Tensor = (changes * others).sum(1).mul_(strengths).sum(1)
        return (gained < 0).repeat_interleave(run)[:rows]


def _in_runs(coupling: Tensor) -> tuple[Tensor, Tensor]:
    """``L`` of each run of rows, ``[runs, run, run]``, and its ``D``, ``[runs, run]``."""
    rows, run = coupling.shape
    runs = torch.nn.functional.pad(coupling, (0, 0, 0, -rows % run)).unflatten(0, (-1, run))
    strengths = runs.diagonal(0, 1, 2).clone()
    lower = runs.tril(-1)
    lower.diagonal(0, 1, 2).fill_(1.0)
    return lower, strengths
