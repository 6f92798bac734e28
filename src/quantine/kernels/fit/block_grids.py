"""Fitting the grids that blocks of other engines have: signed scales, or free minima.

Such grids have no range that must hold zero or all weights, so ranges are only where the search
begins: every candidate's scale (and minimum) is moved to the least squares of the codes that it
gives, and the cheapest is taken. Statistics that are codes then take the cheapest neighbours, in
turn with the float16 that they multiply. All is plain PyTorch, wherever it runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.fit_range import finite_half
from quantine.core.grid import Grid, Statistic, encode
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.kernels.fit.block_statistics import Coded, Found, as_stored, two_least_squares
from quantine.kernels.fit.grid_cost import NORM, GridCost, importance_of

SHARES: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64, 0.55)
"""Candidate ranges, as shares of the min-max range."""
ENDS: Final = (1.0, 0.9, 0.8, 0.68)
"""The same where ranges have two ends: each end may lie at each share."""
ROUNDS: Final = 2
"""Number of times that the cheapest grid is moved once more, and that coded statistics and what
multiplies them are searched in turn."""
LINES: Final = 2**22
"""Number of weights that are fitted at once, which bounds temporary memory to some 100 MB."""


def fit_block_grids(columns: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost) -> Grid:
    """Fit a grid to every group of weights.

    Args:
        columns: ``[groups, n, lines]`` float32.
        spread: ``[groups, n]`` float32, ``d`` of `GridCost` for each weight's input.
        spec: a grid that is `QuantSpec.blocked`. Where ``stat_axis`` is ``"groups"``, runs of
            ``stat_group_size`` groups divide the groups.
        cost: the rounding error that is minimized; ``"minmax"`` tries only the whole range.

    Returns:
        A grid with statistics ``[lines, groups]``.

    Raises:
        SolverError: a scale or a minimum does not fit into float16.
    """
    count = max(1, LINES // max(1, columns[..., 0].numel()))
    parts = [_Fit(part, spread, spec, cost).grid() for part in columns.split(count, 2)]
    return replace(
        parts[0],
        scale=_joined([part.scale for part in parts]),
        minimum=None if spec.sym else _joined([p.minimum for p in parts if p.minimum is not None]),
    )


@dataclass(frozen=True)
class _Fit:
    """The search for the grids of some lines, see `fit_block_grids` for the fields."""

    columns: Tensor
    spread: Tensor
    spec: QuantSpec
    cost: GridCost

    def grid(self) -> Grid:
        found = self._cheapest(map(self._moved, self._candidates()))
        for _ in range(ROUNDS):
            found = self._moved(found)
        scale: Tensor | Statistic = found.scale.T.half()
        minimum: Tensor | Statistic = found.minimum.T.half()
        if self.spec.scale_bits != FLOAT16:
            scale, minimum = self._coded(found)
        spec = self.spec
        least = None if spec.sym else minimum
        return Grid(scale, None, spec.bits, spec.group_size, minimum=least)

    def _candidates(self) -> Iterator[Found]:
        """Grids that cover shares of each group's range, to either side where scales have signs."""
        low, high = self.columns.amin(1), self.columns.amax(1)
        whole = self.cost.clip == "minmax"
        shares, ends = (SHARES[:1], ENDS[:1]) if whole else (SHARES, ENDS)
        if not self.spec.sym:
            low = low.clamp(max=0) if self.spec.scale_bits != FLOAT16 else low
            for below, above in itertools.product(ends, ends):
                centre = (low + high) / 2
                least, most = centre + (low - centre) * below, centre + (high - centre) * above
                if self.spec.scale_bits != FLOAT16:
                    least = least.clamp(max=0)
                step = (most - least) / (2**self.spec.bits - 1)
                yield Found(as_stored(step), -least)
            return
        most, middle = torch.maximum(-low, high), self._middle
        for share in (middle / (middle - 1), *shares):
            for sign in (1.0, -1.0):
                yield self._around(as_stored(most * (sign * share / middle)))

    @property
    def _middle(self) -> int:
        return int(2 ** (self.spec.bits - 1))

    def _around(self, scale: Tensor) -> Found:
        """The symmetric grid of ``scale``."""
        return Found(scale, scale * self._middle)

    def _moved(self, found: Found) -> Found:
        """The cheaper of ``found`` and the least squares of its codes, in float16 where stored so.

        The least squares are weighted as the cost is: by the inputs' importance, if at all.
        """
        codes, weight = self._codes(found), self._weight
        if self.spec.sym:
            centred = codes - self._middle
            square = (weight * centred.square()).sum(1)
            scale = (weight * centred * self.columns).sum(1) / square.clamp(min=1e-20)
            scale = torch.where(square > 0, as_stored(scale), found.scale)
            return self._cheapest(iter([found, self._around(scale)]))
        scale, minimum = two_least_squares(codes, torch.ones_like(codes), self.columns, weight)
        usable = (scale > 0) & torch.isfinite(scale) & torch.isfinite(minimum)
        scale = as_stored(torch.where(usable, scale, found.scale))
        minimum = torch.where(usable, minimum, found.minimum)
        if self.spec.scale_bits != FLOAT16:
            minimum = minimum.clamp(min=0)
        else:
            found = replace(found, minimum=finite_half(found.minimum))
            minimum = finite_half(minimum)
        return self._cheapest(iter([found, Found(scale, minimum)]))

    def _codes(self, found: Found) -> Tensor:
        scale, zero = found.scale.unsqueeze(1), (found.minimum / found.scale).unsqueeze(1)
        return encode(self.columns, scale, zero, self.spec.bits)

    @property
    def _weight(self) -> Tensor:
        if self.cost.clip == "hessian":
            return importance_of(self.spread)
        return self.columns.new_ones(1, 1, 1)

    def _price(self, found: Found) -> Tensor:
        """The cost of every group and line, ``[groups, lines]``."""
        values = self._codes(found).mul_(found.scale.unsqueeze(1))
        errors = values.sub_(found.minimum.unsqueeze(1)).sub_(self.columns)
        if self.cost.clip == "hessian":
            return errors.square_().mul_(self._weight).sum(1)
        return errors.abs_().pow_(NORM).sum(1)

    def _cheapest(self, candidates: Iterator[Found]) -> Found:
        """Group by group the candidate with the least cost, the first of equals."""
        best = next(candidates)
        least = self._price(best)
        for found in candidates:
            price = self._price(found)
            better = price < least
            least = torch.where(better, price, least)
            best = Found(
                torch.where(better, found.scale, best.scale),
                torch.where(better, found.minimum, best.minimum),
            )
        return best

    def _coded(self, found: Found) -> tuple[Statistic, Statistic]:
        """The statistics as codes that a float16 of each run of groups multiplies."""
        coded = Coded.of(found, self.spec)
        for _ in range(ROUNDS):
            coded = self._neighbours(coded)
            coded = self._remultiplied(coded)
        coded = self._neighbours(coded)
        return coded.statistics()

    def _neighbours(self, coded: Coded) -> Coded:
        """The cheapest of the neighbouring codes, group by group."""
        best, least = coded, self._price(coded.found())
        shifts = (0,) if self.spec.sym else (0, -1, 1)
        for of_scale in (0, -1, 1):
            for of_minimum in shifts:
                tried = coded.shifted(of_scale, of_minimum)
                price = self._price(tried.found())
                better = price < least
                least = torch.where(better, price, least)
                best = best.where(better, tried)
        return best

    def _remultiplied(self, coded: Coded) -> Coded:
        """With the float16 of each run moved to the least squares of all codes, where cheaper."""
        found, run = coded.found(), self.spec.stat_group_size
        codes, weight = self._codes(found), self._weight
        runs = self.columns.unflatten(0, (-1, run)).flatten(1, 2)
        weights = weight.expand_as(self.columns).unflatten(0, (-1, run)).flatten(1, 2)
        if self.spec.sym:
            shares = coded.scale_share().unsqueeze(1) * (codes - self._middle)
            shares = shares.unflatten(0, (-1, run)).flatten(1, 2)
            square = (weights * shares.square()).sum(1)
            step = (weights * shares * runs).sum(1) / square.clamp(min=1e-20)
            moved = replace(coded, step=torch.where(square > 0, as_stored(step), coded.step))
        else:
            shares = coded.scale_share().unsqueeze(1) * codes
            least = coded.minimum_codes.unsqueeze(1).expand_as(codes)
            step, least_step = two_least_squares(
                shares.unflatten(0, (-1, run)).flatten(1, 2),
                least.unflatten(0, (-1, run)).flatten(1, 2),
                runs,
                weights,
            )
            usable = torch.isfinite(step) & torch.isfinite(least_step)
            usable &= (step > 0) & (least_step > 0)
            moved = replace(
                coded,
                step=as_stored(torch.where(usable, step, coded.step)),
                least_step=as_stored(torch.where(usable, least_step, coded.least_step)),
            )
        before, after = (
            self._price(one.found()).unflatten(0, (-1, run)).sum(1) for one in (coded, moved)
        )
        better = after < before
        return replace(
            moved,
            step=torch.where(better, moved.step, coded.step),
            least_step=torch.where(better, moved.least_step, coded.least_step),
        )


def _joined(parts: list[Tensor | Statistic]) -> Tensor | Statistic:
    """The statistics of neighbouring lines as one."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    coded = [part for part in parts if isinstance(part, Statistic)]
    steps = [part.grid.scale for part in coded if isinstance(part.grid.scale, Tensor)]
    return Statistic.along_lines(
        torch.cat([part.codes for part in coded], 1),
        torch.cat(steps),
        first.grid.bits,
        first.grid.group_size,
        first.grid.zero_point is None,
    )
