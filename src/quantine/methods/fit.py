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
from quantine.kernels.columns import cheapest_grids, first_least, rounding_errors

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

    def cheapest(self, columns: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
        """The candidate grid with the least cost; the first of equals.

        Args:
            columns: ``[groups, n, rows]`` float32.
            scales, zeros: ``[candidates, groups, rows]`` float32.

        Returns:
            Index of a candidate, ``[groups, rows]`` int64.
        """
        scales = positive(scales)
        if self.clip == "hessian" and self.spread is not None:
            importance = self.spread.square().reciprocal()
            return cheapest_grids(columns, importance, scales, zeros, bits, self.price)
        rows = max(1, CHUNK // max(1, columns[..., 0].numel()))
        parts = zip(
            columns.split(rows, 2), scales.split(rows, 2), zeros.split(rows, 2), strict=True
        )
        return torch.cat([_least_power(*part, bits) for part in parts], 1)


def _least_power(columns: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The candidate with the least sum of ``|error| ** 2.4``."""
    costs = (
        rounding_errors(columns, scale, zero, bits).abs_().pow_(NORM).sum(1)
        for scale, zero in zip(scales, zeros, strict=True)
    )
    return first_least(costs)


def squared_errors(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Squared rounding errors of ``columns`` ``[groups, n, rows]``.

    Args:
        scale, zero: ``[groups, rows]`` float32.
    """
    return rounding_errors(columns, positive(scale), zero, bits).square_()


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
    scales, zeros = _fit_range(columns, inliers, spec, objective)
    scale, zero = _scale_stat(scales, spec), _zero_stat(zeros, spec)
    if spec.second_level and objective.clip != "minmax":
        scale, zero = _refine(columns, scale, zero, spec.bits, objective)
    stored_zero = (
        None if spec.sym else zero.stored(torch.float16 if spec.zero_bits else torch.uint8)
    )
    return Grid(scale.stored(torch.float16), stored_zero, spec.bits, columns.shape[1])


def _fit_range(
    columns: Tensor, inliers: Tensor, spec: QuantSpec, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[groups, rows]`` of the min-max range, or of the best share of it."""
    low, high = inliers.amin(1), inliers.amax(1)
    if objective.clip == "minmax":
        return cover(low, high, spec)
    middle = (low + high) / 2 if spec.zero_bits else torch.zeros_like(low)
    shares = torch.tensor(SHRINKS).view(-1, 1, 1)
    scales, zeros = cover(middle + (low - middle) * shares, middle + (high - middle) * shares, spec)
    best = objective.cheapest(columns, scales, zeros, spec.bits).unsqueeze(0)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


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
    tried = [
        (scale.shifted(scale_shift), zero.shifted(zero_shift))
        for scale_shift in scale.shifts()
        for zero_shift in zero.shifts()
    ]
    scales = torch.stack([one.values() for one, _ in tried])
    zeros = torch.stack([one.values() for _, one in tried])
    best = objective.cheapest(columns, scales, zeros, bits).unsqueeze(0)
    scale_codes = torch.stack([one.codes for one, _ in tried]).gather(0, best)[0]
    zero_codes = torch.stack([one.codes for _, one in tried]).gather(0, best)[0]
    return replace(scale, codes=scale_codes), replace(zero, codes=zero_codes)


def positive(scale: Tensor) -> Tensor:
    """``scale`` fit to divide by: a second grid may round a small one to zero or below."""
    return scale.clamp(min=SMALLEST_DIVISOR)
