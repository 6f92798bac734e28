"""The meaning of `quantine.kernels.fit.fit_groups`, in plain PyTorch.

Weights come transposed, ``[groups, n, lines]``, see `quantine.kernels.fit.grid_cost`. Whatever is
searched, the range of a group or the codes of its scale and zero point, minimizes one `GridCost`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.fit_range import (
    finite_half,
    fit_fractional,
    fit_statistic,
    fit_whole,
    to_float16,
)
from quantine.core.grid import Grid, Statistic
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.kernels.fit.grid_cost import Clip, GridCost, importance_of, squared_errors

SHRINKS: Final = tuple(1.0 - 0.025 * step for step in range(21))
"""Candidate ranges, as shares of the min-max range: 1.0 down to 0.5."""
FARTHEST: Final = 64.0
"""Distance from zero, in widths of the range, from which a min-max range is extended to zero."""


@dataclass(frozen=True)
class _StatisticCodes:
    """The scales, or the zero points, of some groups while their codes are chosen.

    Attributes:
        codes: ``[groups, lines]`` float32, the numbers that are stored: codes, or the values
            themselves where there is no second grid.
        top: largest code; 0 where values are stored as they are, so that no code can be chosen.
        grid: second grid of the codes; ``None`` where codes are values.
    """

    codes: Tensor
    top: int = 0
    grid: Grid | None = None

    def values(self) -> Tensor:
        """The scales or zero points that the codes stand for, ``[groups, lines]`` float32."""
        return self.codes if self.grid is None else self.grid.decode(self.codes)

    def shifts(self) -> tuple[int, ...]:
        """The changes of a code that the search tries, no change first."""
        return (0, -1, 1) if self.top else (0,)

    def shifted(self, by: int) -> _StatisticCodes:
        """The same with every code changed ``by`` that much, within the range of codes."""
        return replace(self, codes=(self.codes + by).clamp_(0, self.top)) if by else self

    def stored(self, dtype: torch.dtype) -> Tensor | Statistic:
        """The statistics in the form of `Grid.scale` and `Grid.zero_point`.

        Args:
            dtype: dtype of values that have no second grid.
        """
        if self.grid is None:
            return self.codes.T.to(dtype)
        return Statistic(self.codes.to(torch.uint8), self.grid)


SecondGrids = tuple[Grid | None, Grid | None]
"""The second grids of scales and of zero points over ``[groups, lines]``.

``None`` stands for statistics that are not quantized.
"""


def fit_groups_reference(
    columns: Tensor,
    spread: Tensor,
    spec: QuantSpec,
    cost: GridCost,
    second: SecondGrids | None = None,
) -> Grid:
    """Fit a grid to every group of weights.

    First the range of each group and line is chosen. Without a second level it gives scale and zero
    point. With one (SpQR, arXiv 2306.03078, section 4.2), both are put on their second grids; then
    each group and line takes, among the neighbouring codes of both, those with the least cost.

    Args:
        columns: ``[groups, n, lines]`` float32.
        spread: ``d`` of `GridCost` for each weight's input, float32: ``[groups, n]``, or
            ``[lines]`` where ``spec.group_axis`` is ``"out"``.
        spec: bits of codes, scales and zero points.
        cost: the rounding error that is minimized.
        second: second grids that were fitted before, so that only codes are chosen.

    Returns:
        A grid with statistics ``[lines, groups]``.

    Raises:
        SolverError: a scale or a zero point does not fit into float16.
    """
    inliers = columns
    if cost.leaves_out:
        inliers = without_outliers(columns, spread, spec, cost)
    if cost.clip != "hessian":
        columns = inliers  # these costs know no price of an outlier
    scales, zeros = _fit_range(columns, inliers, spread, spec, cost)
    of_scales, of_zeros = second or (None, None)
    scale, zero = _scale_stat(scales, spec, of_scales), _zero_stat(zeros, spec, of_zeros)
    if spec.second_level and cost.clip != "minmax":
        scale, zero = _refine(columns, spread, scale, zero, spec.bits, cost)
    stored_zero = (
        None if spec.sym else zero.stored(torch.float16 if spec.zero_bits else torch.uint8)
    )
    return Grid(
        scale.stored(torch.float16), stored_zero, spec.bits, columns.shape[1], spec.group_axis
    )


def _fit_range(
    columns: Tensor, inliers: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost
) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[groups, lines]`` of the min-max range, or of the best share of it.

    Args:
        columns: the weights whose error counts.
        inliers: the weights that the range has to cover.
    """
    low, high = inliers.amin(1), inliers.amax(1)
    if cost.clip == "minmax":
        return cover(low, high, spec, "minmax")
    middle = (low + high) / 2 if spec.zero_bits else torch.zeros_like(low)
    shares = torch.tensor(SHRINKS, dtype=low.dtype, device=low.device).view(-1, 1, 1)
    lows, highs = (middle + (end - middle) * shares for end in (low, high))
    scales, zeros = cover(lows, highs, spec, cost.clip)
    best = cost.cheapest(columns, spread, scales, zeros, spec.bits).unsqueeze(0)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def cover(low: Tensor, high: Tensor, spec: QuantSpec, clip: Clip) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers the range from ``low`` to ``high``.

    Args:
        low, high: float32 of one shape, which the results have, too.
        spec: says whether zero points are whole numbers in the code range.
        clip: decides how far a range may lie from zero.
    """
    if spec.zero_bits:
        return fit_fractional(low, high, spec.bits, farthest_of(spec, clip))
    return fit_whole(low, high, spec.bits, spec.sym)


def farthest_of(spec: QuantSpec, clip: Clip) -> float:
    """Distance from zero, in widths of the range, from which a range is extended to zero.

    For min-max ranges it is `FARTHEST`: they follow SpQR's published code as far as weights really
    lie. Searched ranges may lie less far: the scale of a range ``k`` widths from zero is ``1 / k``
    of one that would reach zero, and its zero point ``k`` times as large. Where one second grid
    holds both kinds, the error of either statistic is multiplied with the other, so it grows with
    ``k**2``: up to ``k**2 = 2**bits``, half a step of the second grid costs at most about half a
    width.
    """
    if clip == "minmax":
        return FARTHEST
    return math.sqrt(2 ** min(spec.scale_bits, spec.zero_bits))


def _scale_stat(scale: Tensor, spec: QuantSpec, second: Grid | None) -> _StatisticCodes:
    if spec.scale_bits == FLOAT16:
        return _StatisticCodes(to_float16(scale))
    return _coded(scale, spec.scale_bits, spec, second)


def _coded(values: Tensor, bits: int, spec: QuantSpec, second: Grid | None) -> _StatisticCodes:
    if second is None:
        fitted = fit_statistic(values, bits, spec.stat_group_length(values.shape[1]))
        return _StatisticCodes(fitted.codes.float(), 2**bits - 1, fitted.grid)
    return _StatisticCodes(second.encode(values).float(), 2**bits - 1, second)


def _zero_stat(zero: Tensor, spec: QuantSpec, second: Grid | None) -> _StatisticCodes:
    if spec.sym:
        return _StatisticCodes(zero)
    if not spec.zero_bits:
        return _StatisticCodes(zero, 2**spec.bits - 1)
    if spec.zero_bits == FLOAT16:
        return _StatisticCodes(finite_half(zero))
    return _coded(zero, spec.zero_bits, spec, second)


def _refine(
    columns: Tensor,
    spread: Tensor,
    scale: _StatisticCodes,
    zero: _StatisticCodes,
    bits: int,
    cost: GridCost,
) -> tuple[_StatisticCodes, _StatisticCodes]:
    """Scales and zero points after a search among the neighbours of their second-level codes.

    Every group and line takes the pair of codes with the least cost.
    """
    tried = [
        (scale.shifted(scale_shift), zero.shifted(zero_shift))
        for scale_shift in scale.shifts()
        for zero_shift in zero.shifts()
    ]
    scales = torch.stack([one.values() for one, _ in tried])
    zeros = torch.stack([one.values() for _, one in tried])
    best = cost.cheapest(columns, spread, scales, zeros, bits).unsqueeze(0)
    scale_codes = torch.stack([one.codes for one, _ in tried]).gather(0, best)[0]
    zero_codes = torch.stack([one.codes for _, one in tried]).gather(0, best)[0]
    return replace(scale, codes=scale_codes), replace(zero, codes=zero_codes)


def without_outliers(columns: Tensor, spread: Tensor, spec: QuantSpec, cost: GridCost) -> Tensor:
    """``columns`` with likely outliers replaced by the mean of their group's other weights.

    A weight is a likely outlier if leaving it out of its group lowers the group's loss by more
    than the cost's price (arXiv 2306.03078, section 4.1). Leaving out a weight between the
    smallest and the largest does not move the range: it saves that weight's own loss. So three
    ranges per group tell about all weights, instead of one for each.

    Args:
        columns: ``[groups, n, lines]`` float32, the shape of the result.
        spread: ``d`` of each weight's input, as for `fit_groups_reference`.
        spec: bits of a code, and whether zero points are whole.
        cost: says what an outlier costs.
    """
    if columns.shape[1] < 2:
        return columns
    ranked, places = columns.sort(1)
    low, high = ranked[:, 0], ranked[:, -1]

    def losses(low: Tensor, high: Tensor) -> Tensor:
        """Loss ``error**2 / d**2`` of each weight, rounded to the grid from ``low`` to ``high``."""
        errors = squared_errors(columns, *cover(low, high, spec, cost.clip), spec.bits)
        return errors.mul_(importance_of(spread))

    loss = losses(low, high)
    whole = loss.sum(1, keepdim=True)
    saved = loss
    for place, ends in ((0, (ranked[:, 1], high)), (-1, (low, ranked[:, -2]))):
        extreme = places[:, place : place + 1 or None]
        others = losses(*ends).scatter_(1, extreme, 0.0)
        saved = saved.scatter(1, extreme, whole - others.sum(1, keepdim=True))
    likely = saved > cost.price
    rest = (~likely).sum(1, keepdim=True).clamp_(min=1)
    mean = columns.masked_fill(likely, 0.0).sum(1, keepdim=True) / rest
    return torch.where(likely, mean, columns)
