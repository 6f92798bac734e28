"""The grid of a group of weights: its range, and the rounding of its scale and zero point.

Weights come transposed, ``[groups, n, rows]``: ``n`` inputs of a group by output rows, which is
how the column loop holds them. Every choice that is searched minimizes one `Objective`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.core.grid import (
    Grid,
    Statistic,
    finite_half,
    fit_fractional,
    fit_range,
    fit_statistic,
    to_float16,
)
from quantine.core.spec import FLOAT16, QuantSpec

Clip = Literal["minmax", "mse", "hessian"]
CLIPS: Final[tuple[Clip, ...]] = ("minmax", "mse", "hessian")
DATA_FREE_CLIPS: Final[tuple[Clip, ...]] = ("minmax", "mse")

SHRINKS: Final = tuple(1.0 - 0.025 * step for step in range(21))
"""Candidate shares of the min-max range: 1.0 down to 0.5."""
NORM: Final = 2.4
"""Exponent of the plain rounding error: above 2, so that a clipped large weight costs more."""
CHUNK: Final = 2**20
"""Weights searched at once: bounds the search's temporary memory to about 16 bytes each."""
SMALLEST_DIVISOR: Final = 1e-9
"""Stands in for scales that a second grid rounded to zero or below."""


@dataclass(frozen=True)
class Objective:
    """What a wrong grid costs.

    Attributes:
        clip: ``"minmax"`` searches nothing; ``"mse"`` is the sum of ``|error| ** 2.4``;
            ``"hessian"`` is the sum of ``min(error**2 / d**2, price)``: what error feedback would
            have to make up for (GPTQ, arXiv 2210.17323, equation 2), or the price of keeping the
            weight as an outlier.
        spread: ``d`` of each weight's input, ``[groups, n]`` float32; of ``"hessian"`` only.
        price: see there; infinite where no outliers can be kept.
    """

    clip: Clip
    spread: Tensor | None = None
    price: float = math.inf

    def cost(self, columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        """Cost ``[groups, rows]`` of coding ``columns`` ``[groups, n, rows]`` on a grid."""
        if self.clip != "hessian" or self.spread is None:
            return _errors(columns, scale, zero, bits).abs_().pow_(NORM).sum(1)
        loss = squared_errors(columns, scale, zero, bits)
        loss.div_(self.spread.square().unsqueeze(-1))
        return loss.clamp_(max=self.price).sum(1)


def squared_errors(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Squared rounding errors of ``columns`` ``[groups, n, rows]``.

    Args:
        scale, zero: ``[groups, rows]`` float32.
    """
    return _errors(columns, scale, zero, bits).square_()


def _errors(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    scale, zero = positive(scale).unsqueeze(1), zero.unsqueeze(1)
    codes = torch.div(columns, scale).add_(zero).round_().clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale).sub_(columns)


@dataclass(frozen=True)
class _Stat:
    """Scales, or zero points, ``[groups, rows]`` while their codes are chosen.

    Attributes:
        codes: float32; what is stored.
        top: largest code; 0 where there is no choice, because values are stored as they are.
        grid: second grid of the codes; ``None`` where codes are values.
    """

    codes: Tensor
    top: int = 0
    grid: Grid | None = None

    def values(self) -> Tensor:
        """What the codes stand for."""
        return self.codes if self.grid is None else self.grid.decode(self.codes)

    def shifts(self) -> tuple[int, ...]:
        """Changes of a code worth trying, none first."""
        return (0, -1, 1) if self.top else (0,)

    def shifted(self, by: int) -> _Stat:
        """Neighbouring codes."""
        return replace(self, codes=(self.codes + by).clamp_(0, self.top)) if by else self

    def stored(self, dtype: torch.dtype) -> Tensor | Statistic:
        """As a `Grid` holds it, ``dtype`` for what has no second grid."""
        if self.grid is None:
            return self.codes.T.to(dtype)
        return Statistic(self.codes.to(torch.uint8), self.grid)


def fit_groups(
    columns: Tensor, spec: QuantSpec, objective: Objective, inliers: Tensor | None = None
) -> Grid:
    """The grid of groups of weights.

    Without a second level this ends with the range. With one, scales and zero points are first
    put on their second grids; then each row takes, among the neighbouring codes of both, those
    with the least cost.

    Args:
        columns: ``[groups, n, rows]`` float32.
        inliers: ``columns`` with likely outliers replaced: the range covers only these.

    Returns:
        A grid of ``rows`` rows.

    Raises:
        SolverError: a scale does not fit into float16.
    """
    inliers = columns if inliers is None else inliers
    if objective.clip != "hessian":
        columns = inliers  # these costs know no price of an outlier
    parts = zip(columns.split(_rows(columns), 2), inliers.split(_rows(columns), 2), strict=True)
    fits = [_fit_range(*part, spec, objective) for part in parts]
    scale = _scale_stat(torch.cat([scale for scale, _ in fits], 1), spec)
    zero = _zero_stat(torch.cat([zero for _, zero in fits], 1), spec)
    if spec.second_level and objective.clip != "minmax":
        scale, zero = _refine(columns, scale, zero, spec.bits, objective)
    stored_zero = (
        None if spec.sym else zero.stored(torch.float16 if spec.zero_bits else torch.uint8)
    )
    return Grid(scale.stored(torch.float16), stored_zero, spec.bits, columns.shape[1])


def _rows(columns: Tensor) -> int:
    """Output rows that are searched at once."""
    return max(1, CHUNK // max(1, columns[..., 0].numel()))


def _fit_range(
    columns: Tensor, inliers: Tensor, spec: QuantSpec, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[groups, rows]`` of the min-max range, or of the best share of it."""
    low, high = inliers.amin(1), inliers.amax(1)
    best_scale, best_zero = cover(low, high, spec)
    if objective.clip == "minmax":
        return best_scale, best_zero
    least = objective.cost(columns, best_scale, best_zero, spec.bits)
    middle = (low + high) / 2 if spec.zero_bits else torch.zeros_like(low)
    for shrink in SHRINKS[1:]:
        low_end, high_end = (middle + (end - middle) * shrink for end in (low, high))
        scale, zero = cover(low_end, high_end, spec)
        cost = objective.cost(columns, scale, zero, spec.bits)
        better = cost < least
        least = torch.where(better, cost, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def cover(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid over the range from ``low`` to ``high``, of any shape.

    The scale of a range ``k`` widths from zero is ``1 / k`` of one that would reach zero, and its
    zero point ``k`` times as large. Where one second grid holds both kinds, the error of either
    statistic is multiplied with the other, so it grows with ``k**2``: up to ``k**2 = 2**bits``,
    half a step of the second grid costs at most about half a width.
    """
    if spec.zero_bits:
        farthest = 2.0 ** (min(spec.scale_bits, spec.zero_bits) / 2)
        return fit_fractional(low, high, spec.bits, farthest)
    return fit_range(low, high, spec.bits, spec.sym)


def _scale_stat(scale: Tensor, spec: QuantSpec) -> _Stat:
    if spec.scale_bits == FLOAT16:
        return _Stat(to_float16(scale))
    fitted = fit_statistic(scale, spec.scale_bits, spec.stat_group_length(scale.shape[1]))
    return _Stat(fitted.codes.float(), 2**spec.scale_bits - 1, fitted.grid)


def _zero_stat(zero: Tensor, spec: QuantSpec) -> _Stat:
    if spec.sym:
        return _Stat(zero)
    if not spec.zero_bits:
        return _Stat(zero, 2**spec.bits - 1)
    if spec.zero_bits == FLOAT16:
        return _Stat(finite_half(zero))
    fitted = fit_statistic(zero, spec.zero_bits, spec.stat_group_length(zero.shape[1]))
    return _Stat(fitted.codes.float(), 2**spec.zero_bits - 1, fitted.grid)


def _refine(
    columns: Tensor, scale: _Stat, zero: _Stat, bits: int, objective: Objective
) -> tuple[_Stat, _Stat]:
    """Per group and row the neighbouring codes of scale and zero point with the least cost."""
    least = torch.full_like(scale.codes, math.inf)
    best_scale, best_zero = scale.codes.clone(), zero.codes.clone()
    rows = _rows(columns)
    parts = [slice(start, start + rows) for start in range(0, columns.shape[2], rows)]
    for scale_shift in scale.shifts():
        for zero_shift in zero.shifts():
            tried_scale, tried_zero = scale.shifted(scale_shift), zero.shifted(zero_shift)
            step, offset = positive(tried_scale.values()), tried_zero.values()
            for part in parts:
                cost = objective.cost(columns[..., part], step[:, part], offset[:, part], bits)
                better = cost < least[:, part]
                least[:, part] = torch.where(better, cost, least[:, part])
                for best, tried in ((best_scale, tried_scale), (best_zero, tried_zero)):
                    best[:, part] = torch.where(better, tried.codes[:, part], best[:, part])
    return replace(scale, codes=best_scale), replace(zero, codes=best_zero)


def positive(scale: Tensor) -> Tensor:
    """``scale`` fit to divide by: a second grid may round a small one to zero or below."""
    return scale.clamp(min=SMALLEST_DIVISOR)
