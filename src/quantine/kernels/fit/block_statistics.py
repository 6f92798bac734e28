"""Scales and minima of ggml's blocks while they are searched, as numbers and as codes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.fit_range import LARGEST_SCALE, SMALLEST_SCALE, finite_half
from quantine.core.grid import Statistic
from quantine.core.spec import QuantSpec

LEAST_DETERMINANT: Final = 1e-6
"""Share of the product of its diagonal below which the determinant of a least-squares fit of two
numbers counts as 0: all weights then have one code, and the candidate stays as it is."""


@dataclass(frozen=True)
class Found:
    """A scale and what is subtracted, ``[groups, lines]`` float32 each.

    Attributes:
        scale: of either sign, never 0.
        minimum: the middle code times ``scale`` in symmetric grids.
    """

    scale: Tensor
    minimum: Tensor


@dataclass(frozen=True)
class Coded:
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
    def of(cls, found: Found, spec: QuantSpec) -> Coded:
        """The nearest codes, with steps by which the largest statistics have the outermost."""
        scales = found.scale.unflatten(0, (-1, spec.stat_group_size))
        if spec.sym:
            place = scales.abs().argmax(1, keepdim=True)
            step = as_stored(scales.gather(1, place)[:, 0] / -(2 ** (spec.scale_bits - 1)))
            nothing = torch.zeros_like(step), torch.zeros_like(found.scale)
            empty = cls(spec, step, found.scale, *nothing)
            return replace(empty, codes=empty._allowed((scales / step.unsqueeze(1)).flatten(0, 1)))
        minima = found.minimum.unflatten(0, (-1, spec.stat_group_size))
        step = as_stored(scales.amax(1) / (2**spec.scale_bits - 1))
        least_step = as_stored(minima.amax(1) / (2**spec.zero_bits - 1))
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

    def found(self) -> Found:
        """The scales and minima that the codes stand for."""
        run = self.spec.stat_group_size
        scale = self.scale_share() * self.step.repeat_interleave(run, 0)
        if self.spec.sym:
            return Found(scale, scale * 2 ** (self.spec.bits - 1))
        return Found(scale, self.minimum_codes * self.least_step.repeat_interleave(run, 0))

    def shifted(self, of_scale: int, of_minimum: int) -> Coded:
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

    def where(self, chosen: Tensor, other: Coded) -> Coded:
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


def as_stored(scale: Tensor) -> Tensor:
    """Scales of either sign as float16 has them, none of them 0."""
    magnitude = scale.abs().clamp(min=SMALLEST_SCALE)
    rounded = finite_half(magnitude.clamp_(max=2 * LARGEST_SCALE))
    return torch.where(scale < 0, -rounded, rounded)


def two_least_squares(
    first: Tensor, second: Tensor, columns: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` with the least squares of ``a * first - b * second - columns``.

    Sums run over the second dimension. Neither is a number where `LEAST_DETERMINANT` says so.

    Args:
        first, second, columns: ``[groups, n, lines]``.
        weight: of each square, in a shape that broadcasts to that.
    """
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
