"""The rounding error that a grid is chosen to minimize, and the search among candidate grids.

Weights come transposed, ``[groups, n, lines]``: the ``n`` weights of each group, in each line (a
line is a row of the matrix where groups run along inputs, else a column).

The spread ``d`` of an input is its entry on the diagonal of the inverse Hessian's Cholesky factor
(GPTQ, arXiv 2210.17323, section 3.3): ``[groups, n]`` where lines are rows, ``[lines]`` where they
are columns.
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
"""How the range of a group is chosen, see `GridCost`."""
CLIPS: Final[tuple[Clip, ...]] = ("minmax", "mse", "hessian")
"""All values of `Clip`."""
DATA_FREE_CLIPS: Final[tuple[Clip, ...]] = ("minmax", "mse")
"""The values of `Clip` that need no calibration."""

NORM: Final = 2.4
"""Exponent of the error in ``"mse"``: above 2, so that a clipped large weight costs more."""
CHUNK: Final = 2**20
"""Number of weights searched at once, which bounds temporary memory to about 16 bytes for each."""
SMALLEST_DIVISOR: Final = 1e-9
"""Least scale to divide by: replaces scales that a second grid rounded to zero or below."""


@dataclass(frozen=True)
class GridCost:
    """The rounding error of a group that its grid is chosen to minimize.

    Attributes:
        clip: ``"minmax"``: the grid covers all weights, nothing is searched. ``"mse"``: the sum of
            ``|error| ** 2.4``. ``"hessian"``: the sum of ``min(error**2 / d**2, price)``, which is
            what error feedback has to make up for (GPTQ, arXiv 2210.17323, equation 2), or the
            price of keeping the weight as an outlier; ``d`` is the spread of the weight's input.
        price: threshold of ``error**2 / d**2`` above which a weight is kept as an outlier;
            infinite where none are kept.
        look_ahead: whether ranges leave out likely outliers beforehand, see
            `quantine.kernels.fit.reference.without_outliers`.
    """

    clip: Clip
    price: float = math.inf
    look_ahead: bool = False

    @property
    def leaves_out(self) -> bool:
        """Whether ranges leave out likely outliers: where a price says what those are."""
        return self.look_ahead and self.price < math.inf

    def cheapest(
        self, columns: Tensor, spread: Tensor, scales: Tensor, zeros: Tensor, bits: int
    ) -> Tensor:
        """Choose for every group and line the candidate grid with the least cost.

        Args:
            columns: ``[groups, n, lines]`` float32.
            spread: ``d`` of each weight's input, float32, in one of the shapes the module names.
            scales, zeros: ``[candidates, groups, lines]`` float32.
            bits: number of bits of one code.

        Returns:
            ``[groups, lines]`` int64, the number of the candidate; the first of equals.
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
    """The weight ``1 / d**2`` of squared errors, in a shape that broadcasts to weights.

    Args:
        spread: ``[groups, n]`` or ``[lines]`` float32.
    """
    importance = spread.square().reciprocal()
    return importance.unsqueeze(-1) if spread.ndim == 2 else importance


def squared_errors(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Squared rounding errors of ``columns``, in their shape.

    Args:
        columns: ``[groups, n, lines]`` float32.
        scale, zero: ``[groups, lines]`` float32; scales need not be positive, see `positive`.
        bits: number of bits of one code.
    """
    return rounding_errors(columns, positive(scale), zero, bits).square_()


def rounding_errors(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Rounded values minus ``columns``, float32 in their shape.

    Args:
        columns: ``[groups, n, lines]`` float32.
        scale, zero: ``[groups, lines]`` float32, scales positive.
        bits: number of bits of one code.
    """
    scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
    return decode(encode(columns, scale, zero, bits), scale, zero).sub_(columns)


def positive(scale: Tensor) -> Tensor:
    """``scale`` raised to at least `SMALLEST_DIVISOR`.

    A second grid may round a small scale to zero or below.
    """
    return scale.clamp(min=SMALLEST_DIVISOR)


def _first_least(costs: Iterable[Tensor]) -> Tensor:
    """Element by element the number of the tensor with the least value, the first of equals.

    Args:
        costs: tensors of one shape, of which only two are held at a time.
    """
    stream = iter(costs)
    least = next(stream)
    best = torch.zeros_like(least, dtype=torch.int64)
    for index, cost in enumerate(stream, 1):
        better = cost < least
        least = torch.where(better, cost, least)
        best.masked_fill_(better, index)
    return best
