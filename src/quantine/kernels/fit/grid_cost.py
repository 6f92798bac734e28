"""What a wrong grid costs, and the search among candidate grids.

Weights come transposed, ``[groups, n, lines]``: ``n`` weights of a group, for each line. Their
spread is ``[groups, n]`` where lines are rows, and ``[lines]`` where they are columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.core.grid import decode, encode

Clip = Literal["minmax", "mse", "hessian"]
CLIPS: Final[tuple[Clip, ...]] = ("minmax", "mse", "hessian")
DATA_FREE_CLIPS: Final[tuple[Clip, ...]] = ("minmax", "mse")

NORM: Final = 2.4
"""Exponent of the plain rounding error: above 2, so that a clipped large weight costs more."""
CHUNK: Final = 2**20
"""Weights searched at once: bounds the search's temporary memory to about 16 bytes each."""
SMALLEST_DIVISOR: Final = 1e-9
"""Stands in for scales that a second grid rounded to zero or below."""


@dataclass(frozen=True)
class GridCost:
    """What a wrong grid costs.

    Attributes:
        clip: ``"minmax"`` searches nothing; ``"mse"`` is the sum of ``|error| ** 2.4``;
            ``"hessian"`` is the sum of ``min(error**2 / d**2, price)``: what error feedback would
            have to make up for (GPTQ, arXiv 2210.17323, equation 2), or the price of keeping the
            weight as an outlier. ``d`` is the spread of a weight's input.
        price: see there; infinite where no outliers can be kept.
        look_ahead: ranges leave out likely outliers, see
            `quantine.kernels.fit.reference.without_outliers`.
    """

    clip: Clip
    price: float = math.inf
    look_ahead: bool = False

    def cheapest(
        self, columns: Tensor, spread: Tensor, scales: Tensor, zeros: Tensor, bits: int
    ) -> Tensor:
        """The candidate grid with the least cost; the first of equals.

        Args:
            columns: ``[groups, n, lines]`` float32.
            spread: ``d`` of each weight's input, float32.
            scales, zeros: ``[candidates, groups, lines]`` float32.

        Returns:
            Index of a candidate, ``[groups, lines]`` int64.
        """
        scales = positive(scales)
        importance = importance_of(spread).expand_as(columns)
        count = max(1, CHUNK // max(1, columns[..., 0].numel()))
        parts = zip(
            columns.split(count, 2),
            importance.split(count, 2),
            scales.split(count, 2),
            zeros.split(count, 2),
            strict=True,
        )
        return torch.cat([self._cheapest_of_lines(*part, bits) for part in parts], 1)

    def _cheapest_of_lines(
        self, columns: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int
    ) -> Tensor:
        def cost(scale: Tensor, zero: Tensor) -> Tensor:
            errors = rounding_errors(columns, scale, zero, bits)
            if self.clip == "hessian":
                return errors.square_().mul_(importance).clamp_(max=self.price).sum(1)
            return errors.abs_().pow_(NORM).sum(1)

        return _first_least(cost(*grid) for grid in zip(scales, zeros, strict=True))


def importance_of(spread: Tensor) -> Tensor:
    """``1 / d**2``, of a shape that goes with ``[groups, n, lines]``."""
    importance = spread.square().reciprocal()
    return importance.unsqueeze(-1) if spread.ndim == 2 else importance


def squared_errors(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Squared rounding errors of ``columns`` ``[groups, n, lines]``.

    Args:
        scale, zero: ``[groups, lines]`` float32.
    """
    return rounding_errors(columns, positive(scale), zero, bits).square_()


def rounding_errors(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What rounding adds to ``columns`` ``[groups, n, lines]`` float32.

    Args:
        scale, zero: ``[groups, lines]`` float32, scales positive.
    """
    scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
    return decode(encode(columns, scale, zero, bits), scale, zero).sub_(columns)


def positive(scale: Tensor) -> Tensor:
    """``scale`` fit to divide by: a second grid may round a small one to zero or below."""
    return scale.clamp(min=SMALLEST_DIVISOR)


def _first_least(costs: Iterable[Tensor]) -> Tensor:
    """Index of the least of ``costs``, the first of equals; int64 of their shape."""
    stream = iter(costs)
    least = next(stream)
    best = torch.zeros_like(least, dtype=torch.int64)
    for index, cost in enumerate(stream, 1):
        better = cost < least
        least = torch.where(better, cost, least)
        best.masked_fill_(better, index)
    return best
