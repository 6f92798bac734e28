"""The grids of a matrix's groups while they are fitted one after another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.kernels.fit.reference import SecondGrids


@dataclass(frozen=True)
class _Statistics:
    """Scales, or zero points, of the groups of a matrix, while they are fitted.

    Attributes:
        values: ``[groups, rows]`` float32.
        codes: ``[groups, rows]`` uint8: codes of the values on second grids, where there are some.
        step, zero: ``[groups, runs]`` float32: the second grids.
    """

    values: Tensor
    codes: Tensor
    step: Tensor
    zero: Tensor

    @classmethod
    def empty(cls, groups: int, rows: int, run: int, device: torch.device) -> _Statistics:
        values = torch.empty(groups, rows, device=device)
        second = torch.empty(groups, -(-rows // run), device=device)
        return cls(values, torch.empty_like(values, dtype=torch.uint8), second, second.clone())

    def put(self, group: int, values: Tensor, stored: Tensor | Statistic | None) -> None:
        """Take what was fitted to one group: ``values`` ``[rows, 1]``."""
        self.values[group] = values[:, 0]
        if isinstance(stored, Statistic):
            self.codes[group] = stored.codes[0]
            self.step[group] = stored.grid.scales()[0]
            self.zero[group] = stored.grid.zeros()[0]

    def second(self, group: int, bits: int, run: int) -> Grid:
        """The second grid of one group."""
        one = slice(group, group + 1)
        return Grid(self.step[one], self.zero[one], bits, run)

    def stored(self, places: Tensor | slice, bits: int, run: int) -> Tensor | Statistic:
        """As a `Grid` holds them: whole zero points (``bits`` 0), float16, or codes."""
        if bits in {0, FLOAT16}:
            return self.values[places].T.to(torch.float16 if bits else torch.uint8)
        grid = Grid(self.step[places].half(), self.zero[places].half(), bits, run)
        return Statistic(self.codes[places], grid)

    def in_lines(self, places: Tensor, bits: int, second: Grid | None) -> Tensor | Statistic:
        """Those of groups of outputs, as a `Grid` holds them; input ``places[j]`` as number ``j``.

        Args:
            second: the second grid of ``[groups, in]``; ``None`` where there is none.
        """
        if second is not None:
            return Statistic(self.codes[places].T.contiguous(), second)
        return self.values[places].to(torch.float16 if bits else torch.uint8)


@dataclass(frozen=True)
class FittedGroups:
    """The grids of a matrix's groups, which are fitted one after another.

    Attributes:
        length: weights of a group.
        run: rows whose statistics share a second grid.
        given: second grids are there from the start.
    """

    spec: QuantSpec
    length: int
    run: int
    scale: _Statistics
    zero: _Statistics
    given: bool = False

    @classmethod
    def empty(
        cls, groups: int, rows: int, length: int, spec: QuantSpec, device: torch.device
    ) -> FittedGroups:
        """Room for ``groups`` of ``length`` inputs."""
        run = min(spec.stat_group_length(rows), rows)
        scale, zero = (_Statistics.empty(groups, rows, run, device) for _ in range(2))
        return cls(spec, length, run, scale, zero)

    @classmethod
    def of_columns(
        cls,
        inputs: int,
        outputs: int,
        spec: QuantSpec,
        second: SecondGrids,
        device: torch.device,
    ) -> FittedGroups:
        """Room for ``inputs`` columns, whose groups of outputs are lines of one problem each.

        Args:
            second: grids over ``[inputs, groups]`` of codes, in runs of one.
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
        """The second grids of a group that were given."""
        if not self.given:
            return None
        bits = self.spec.scale_bits, self.spec.zero_bits
        of_scales, of_zeros = (
            None if width in {0, FLOAT16} else level.second(group, width, self.run)
            for level, width in zip((self.scale, self.zero), bits, strict=True)
        )
        return of_scales, of_zeros

    def put(self, group: int, grid: Grid) -> None:
        """Take the ``grid`` of one group."""
        self.scale.put(group, grid.scales(), grid.scale)
        self.zero.put(group, grid.zeros(), grid.zero_point)

    def grid(self, places: Tensor | None = None) -> Grid:
        """The grid of all groups: as they came, or group ``places[i]`` as number ``i``."""
        chosen = slice(None) if places is None else places
        spec = self.spec
        zero = None if spec.sym else self.zero.stored(chosen, spec.zero_bits, self.run)
        scale = self.scale.stored(chosen, spec.scale_bits, self.run)
        return Grid(scale, zero, spec.bits, self.length, spec.group_axis)
