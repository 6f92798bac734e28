"""The grids of a matrix while its groups are fitted one after another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.kernels.fit.misfit import MISFITS, raise_misfit
from quantine.kernels.fit.reference import SecondGrids


@dataclass(frozen=True)
class _Statistics:
    """The scales, or the zero points, of all groups; rows are the lines of `Grid`.

    Attributes:
        values: ``[groups, rows]`` float32, as they will be decoded.
        codes: ``[groups, rows]`` uint8, their codes on second grids; unused without a second level.
        step, zero: ``[groups, runs]`` float32, scale and zero point of the second grid of each run
            of rows; unused without a second level.
    """

    values: Tensor
    codes: Tensor
    step: Tensor
    zero: Tensor

    @classmethod
    def empty(cls, groups: int, rows: int, run: int, device: torch.device) -> _Statistics:
        values = torch.empty(groups, rows, dtype=torch.float32, device=device)
        second = torch.empty(groups, -(-rows // run), dtype=torch.float32, device=device)
        return cls(values, torch.empty_like(values, dtype=torch.uint8), second, second.clone())

    def put(self, group: int, values: Tensor, stored: Tensor | Statistic | None) -> None:
        """Store the statistics of group number ``group``.

        Args:
            values: ``[rows, 1]`` float32.
            stored: the same as `Grid` holds them; codes and second grid are taken from it.
        """
        self.values[group] = values[:, 0]
        if isinstance(stored, Statistic):
            self.codes[group] = stored.codes[0]
            self.step[group] = stored.grid.scales()[0]
            self.zero[group] = stored.grid.zeros()[0]

    def second(self, group: int, bits: int, run: int) -> Grid:
        """The second grid of one group, of codes of ``bits`` bits and runs of ``run`` rows."""
        one = slice(group, group + 1)
        return Grid(self.step[one], self.zero[one], bits, run)

    def stored(self, places: Tensor | slice, bits: int, run: int) -> Tensor | Statistic:
        """The statistics in the form of `Grid.scale` and `Grid.zero_point`.

        Args:
            places: the groups wanted, in this order.
            bits: 0 for whole zero points in uint8, 16 for float16, else bits of second-level codes.
            run: rows that share a second grid.
        """
        if bits in {0, FLOAT16}:
            return self.values[places].T.to(torch.float16 if bits else torch.uint8)
        grid = Grid(self.step[places].half(), self.zero[places].half(), bits, run)
        return Statistic(self.codes[places], grid)

    def in_lines(self, places: Tensor, bits: int, second: Grid | None) -> Tensor | Statistic:
        """The statistics where groups run along outputs, in the form that `Grid` has.

        Args:
            places: ``[in]`` int64: input ``j`` was column ``places[j]`` in the loop.
            bits: 0 for whole zero points in uint8; else float16 or codes.
            second: second grid over ``[groups, in]``; ``None`` without a second level.
        """
        if second is not None:
            return Statistic(self.codes[places].T.contiguous(), second)
        return self.values[places].to(torch.float16 if bits else torch.uint8)


@dataclass(frozen=True)
class FittedGroups:
    """The grids of a matrix, filled in group by group.

    Attributes:
        spec: bits of codes, scales and zero points.
        length: number of weights of a group.
        run: number of consecutive rows whose statistics share a second grid.
        scale, zero: the scales and zero points found so far.
        misfits: ``[2]`` float32: for each of `MISFITS` the largest value that a program on a GPU
            could not store in float16; 0 where all fit. Other kernels raise an error at once.
        given: whether second grids were fitted before, so that only codes on them are chosen.
    """

    spec: QuantSpec
    length: int
    run: int
    scale: _Statistics
    zero: _Statistics
    misfits: Tensor
    given: bool = False

    @classmethod
    def empty(
        cls, groups: int, rows: int, length: int, spec: QuantSpec, device: torch.device
    ) -> FittedGroups:
        """Room for the grids of ``groups`` groups of ``length`` inputs in each of ``rows`` rows."""
        run = min(spec.stat_group_length(rows), rows)
        scale, zero = (_Statistics.empty(groups, rows, run, device) for _ in range(2))
        misfits = torch.zeros(len(MISFITS), dtype=torch.float32, device=device)
        return cls(spec, length, run, scale, zero, misfits)

    @classmethod
    def of_columns(
        cls,
        inputs: int,
        outputs: int,
        spec: QuantSpec,
        second: SecondGrids,
        device: torch.device,
    ) -> FittedGroups:
        """Room for the grids of a matrix whose groups run along outputs.

        Each column is fitted as one group whose lines are the column's groups of outputs.

        Args:
            inputs, outputs: shape of the matrix.
            spec: its ``group_axis`` is ``"out"``.
            second: second grids of scales and of zero points over ``[inputs, groups]``, one for
                each entry; ``None`` without a second level.
            device: where the tensors are made.
        """
        length = spec.group_length(outputs)
        one_by_one = replace(spec, stat_group_size=1)
        fitted = cls.empty(inputs, outputs // length, length, one_by_one, device)
        for level, grid in zip((fitted.scale, fitted.zero), second, strict=True):
            if grid is not None:
                level.step.copy_(grid.scales())
                level.zero.copy_(grid.zeros())
        return replace(fitted, given=True)

    def second(self, group: int) -> SecondGrids | None:
        """The second grids of scales and zero points that `of_columns` was given for a column.

        ``None`` where none were given and both are still to be fitted.
        """
        if not self.given:
            return None
        bits = self.spec.scale_bits, self.spec.zero_bits
        of_scales, of_zeros = (
            None if width in {0, FLOAT16} else level.second(group, width, self.run)
            for level, width in zip((self.scale, self.zero), bits, strict=True)
        )
        return of_scales, of_zeros

    def put(self, group: int, grid: Grid) -> None:
        """Store ``grid``, fitted to group number ``group`` alone."""
        self.scale.put(group, grid.scales(), grid.scale)
        self.zero.put(group, grid.zeros(), grid.zero_point)

    def check(self) -> None:
        """Raise the error that programs on a GPU have noted; this waits for them.

        Raises:
            SolverError: a scale or a zero point does not fit into float16.
        """
        for misfit in zip(MISFITS, self.misfits.tolist(), strict=True):
            raise_misfit(misfit if misfit[1] else None)

    def grid(self, places: Tensor | None = None) -> Grid:
        """The grid of the whole matrix, groups along inputs.

        Args:
            places: int64: group ``i`` of the result is group ``places[i]`` here; ``None`` keeps
                the order in which groups were stored.
        """
        chosen = slice(None) if places is None else places
        spec = self.spec
        zero = None if spec.sym else self.zero.stored(chosen, spec.zero_bits, self.run)
        scale = self.scale.stored(chosen, spec.scale_bits, self.run)
        return Grid(scale, zero, spec.bits, self.length, spec.group_axis)
