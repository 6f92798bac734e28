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

from quantine.core.fit_range import LARGEST_SCALE, SMALLEST_SCALE, finite_half
from quantine.core.grid import Grid, Statistic, encode
from quantine.core.spec import FLOAT16, QuantSpec
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
LEAST_DETERMINANT: Final = 1e-6
"""Share of the product of its diagonal below which the determinant of a least-squares fit of two
numbers counts as 0: all weights then have one code, and the candidate stays as it is."""


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
class _Found:
    """A scale and what is subtracted, ``[groups, lines]`` float32 each.

    Attributes:
        scale: of either sign, never 0.
        minimum: the middle code times ``scale`` in symmetric grids.
    """

    scale: Tensor
    minimum: Tensor


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

    def _candidates(self) -> Iterator[_Found]:
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
                yield _Found(_stored(step), -least)
            return
        most, middle = torch.maximum(-low, high), self._middle
        for share in (middle / (middle - 1), *shares):
            for sign in (1.0, -1.0):
                yield self._around(_stored(most * (sign * share / middle)))

    @property
    def _middle(self) -> int:
        return int(2 ** (self.spec.bits - 1))

    def _around(self, scale: Tensor) -> _Found:
        """The symmetric grid of ``scale``."""
        return _Found(scale, scale * self._middle)

    def _moved(self, found: _Found) -> _Found:
        """The cheaper of ``found`` and the least squares of its codes, in float16 where stored so.

        The least squares are weighted as the cost is: by the inputs' importance, if at all.
        """
        codes, weight = self._codes(found), self._weight
        if self.spec.sym:
            centred = codes - self._middle
            square = (weight * centred.square()).sum(1)
            scale = (weight * centred * self.columns).sum(1) / square.clamp(min=1e-20)
            scale = torch.where(square > 0, _stored(scale), found.scale)
            return self._cheapest(iter([found, self._around(scale)]))
        scale, minimum = _two_least_squares(codes, self.columns, weight)
        usable = (scale > 0) & torch.isfinite(scale) & torch.isfinite(minimum)
        scale = _stored(torch.where(usable, scale, found.scale))
        minimum = torch.where(usable, minimum, found.minimum)
        if self.spec.scale_bits != FLOAT16:
            minimum = minimum.clamp(min=0)
        else:
            found = replace(found, minimum=finite_half(found.minimum))
            minimum = finite_half(minimum)
        return self._cheapest(iter([found, _Found(scale, minimum)]))

    def _codes(self, found: _Found) -> Tensor:
        scale, zero = found.scale.unsqueeze(1), (found.minimum / found.scale).unsqueeze(1)
        return encode(self.columns, scale, zero, self.spec.bits)

    @property
    def _weight(self) -> Tensor:
        if self.cost.clip == "hessian":
            return importance_of(self.spread)
        return self.columns.new_ones(1, 1, 1)

    def _price(self, found: _Found) -> Tensor:
        """The cost of every group and line, ``[groups, lines]``."""
        values = self._codes(found).mul_(found.scale.unsqueeze(1))
        errors = values.sub_(found.minimum.unsqueeze(1)).sub_(self.columns)
        if self.cost.clip == "hessian":
            return errors.square_().mul_(self._weight).sum(1)
        return errors.abs_().pow_(NORM).sum(1)

    def _cheapest(self, candidates: Iterator[_Found]) -> _Found:
        """Group by group the candidate with the least cost, the first of equals."""
        best = next(candidates)
        least = self._price(best)
        for found in candidates:
            price = self._price(found)
            better = price < least
            least = torch.where(better, price, least)
            best = _Found(
                torch.where(better, found.scale, best.scale),
                torch.where(better, found.minimum, best.minimum),
            )
        return best

    def _coded(self, found: _Found) -> tuple[Statistic, Statistic]:
        """The statistics as codes that a float16 of each run of groups multiplies."""
        coded = _Coded.of(found, self.spec)
        for _ in range(ROUNDS):
            coded = self._neighbours(coded)
            coded = self._remultiplied(coded)
        coded = self._neighbours(coded)
        return coded.statistics()

    def _neighbours(self, coded: _Coded) -> _Coded:
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

    def _remultiplied(self, coded: _Coded) -> _Coded:
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
            moved = replace(coded, step=torch.where(square > 0, _stored(step), coded.step))
        else:
            shares = coded.scale_share().unsqueeze(1) * codes
            least = coded.minimum_codes.unsqueeze(1).expand_as(codes)
            step, least_step = _two_least_squares_of(
                shares.unflatten(0, (-1, run)).flatten(1, 2),
                least.unflatten(0, (-1, run)).flatten(1, 2),
                runs,
                weights,
            )
            usable = torch.isfinite(step) & torch.isfinite(least_step)
            usable &= (step > 0) & (least_step > 0)
            moved = replace(
                coded,
                step=_stored(torch.where(usable, step, coded.step)),
                least_step=_stored(torch.where(usable, least_step, coded.least_step)),
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


@dataclass(frozen=True)
class _Coded:
    """Statistics as codes, while they are searched.

    Attributes:
        spec: of the grid.
        step, least_step: ``[runs, lines]`` float32, what codes of scales and of minima multiply.
        codes, minimum_codes: ``[groups, lines]`` float32; codes of minima are 0 in symmetric grids.
    """

    spec: QuantSpec
    step: Tensor
    codes: Tensor
    least_step: Tensor
    minimum_codes: Tensor

    @classmethod
    def of(cls, found: _Found, spec: QuantSpec) -> _Coded:
        """The nearest codes, with steps by which the largest statistics have the outermost."""
        scales = found.scale.unflatten(0, (-1, spec.stat_group_size))
        if spec.sym:
            place = scales.abs().argmax(1, keepdim=True)
            step = _stored(scales.gather(1, place)[:, 0] / -(2 ** (spec.scale_bits - 1)))
            nothing = torch.zeros_like(step), torch.zeros_like(found.scale)
            empty = cls(spec, step, found.scale, *nothing)
            return replace(empty, codes=empty._allowed((scales / step.unsqueeze(1)).flatten(0, 1)))
        minima = found.minimum.unflatten(0, (-1, spec.stat_group_size))
        step = _stored(scales.amax(1) / (2**spec.scale_bits - 1))
        least_step = _stored(minima.amax(1) / (2**spec.zero_bits - 1))
        empty = cls(spec, step, found.scale, least_step, found.minimum)
        codes = (minima / least_step.unsqueeze(1)).round_().clamp_(0, 2**spec.zero_bits - 1)
        return replace(
            empty,
            codes=empty._allowed((scales / step.unsqueeze(1)).flatten(0, 1)),
            minimum_codes=codes.flatten(0, 1),
        )

    def _allowed(self, shares: Tensor) -> Tensor:
        """Codes of scales nearest to ``shares`` of the step; none that makes a scale 0."""
        top, middle = 2**self.spec.scale_bits - 1, self._middle
        codes = shares.round().add_(middle).clamp_(0, top)
        if not self.spec.sym:
            return codes.clamp_(min=1)
        beside = torch.where(shares < 0, middle - 1.0, middle + 1.0)
        return torch.where(codes == middle, beside, codes)

    @property
    def _middle(self) -> int:
        return int(2 ** (self.spec.scale_bits - 1)) if self.spec.sym else 0

    def scale_share(self) -> Tensor:
        """Scales as multiples of their step, ``[groups, lines]``."""
        return self.codes - self._middle

    def found(self) -> _Found:
        """The scales and minima that the codes stand for."""
        run = self.spec.stat_group_size
        scale = self.scale_share() * self.step.repeat_interleave(run, 0)
        if self.spec.sym:
            return _Found(scale, scale * 2 ** (self.spec.bits - 1))
        return _Found(scale, self.minimum_codes * self.least_step.repeat_interleave(run, 0))

    def shifted(self, of_scale: int, of_minimum: int) -> _Coded:
        """With every code changed by so much, as far as it can be."""
        moved = self.scale_share() + of_scale
        if self.spec.sym:  # past zero, from one side to the other
            moved = torch.where(moved == 0, moved + of_scale, moved)
        top = 2**self.spec.zero_bits - 1
        minimum = (self.minimum_codes + of_minimum).clamp_(0, top) if of_minimum else None
        return replace(
            self,
            codes=self._allowed(moved),
            minimum_codes=self.minimum_codes if minimum is None else minimum,
        )

    def where(self, chosen: Tensor, other: _Coded) -> _Coded:
        """With the codes of ``other`` where ``chosen``."""
        return replace(
            self,
            codes=torch.where(chosen, other.codes, self.codes),
            minimum_codes=torch.where(chosen, other.minimum_codes, self.minimum_codes),
        )

    def statistics(self) -> tuple[Statistic, Statistic]:
        """Scales and minima in the form of `Grid`."""
        spec, run = self.spec, self.spec.stat_group_size
        scale = Statistic.along_lines(
            self.codes.to(torch.uint8), self.step.T.half(), spec.scale_bits, run, spec.sym
        )
        minimum = Statistic.along_lines(
            self.minimum_codes.to(torch.uint8),
            self.least_step.T.half(),
            spec.zero_bits or spec.scale_bits,
            run,
            False,
        )
        return scale, minimum


def _stored(scale: Tensor) -> Tensor:
    """Scales of either sign as float16 has them, none of them 0."""
    magnitude = scale.abs().clamp(min=SMALLEST_SCALE)
    rounded = finite_half(magnitude.clamp_(max=2 * LARGEST_SCALE))
    return torch.where(scale < 0, -rounded, rounded)


def _two_least_squares(codes: Tensor, columns: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``scale`` and ``minimum`` with the least squares of ``scale * codes - minimum - columns``.

    They are not finite where all codes are one. Sums run over the second dimension.
    """
    return _two_least_squares_of(codes, torch.ones_like(codes), columns, weight)


def _two_least_squares_of(
    first: Tensor, second: Tensor, columns: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` with the least squares of ``a * first - b * second - columns``."""
    first_square = (weight * first.square()).sum(1)
    second_square = (weight * second.square()).sum(1)
    both = (weight * first * second).sum(1)
    of_first = (weight * first * columns).sum(1)
    of_second = (weight * second * columns).sum(1)
    determinant = first_square * second_square - both.square()
    least = LEAST_DETERMINANT * first_square * second_square
    determinant = torch.where(determinant > least, determinant, torch.nan)
    a = (of_first * second_square - of_second * both) / determinant
    b = (of_first * both - of_second * first_square) / determinant
    return a, b


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
