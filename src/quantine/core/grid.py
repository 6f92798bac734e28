"""The affine grid: the only rounding in the project.

A group of values is stored as integer codes ``q`` in ``[0, 2**bits - 1]`` and decoded as
``scale * (q - zero_point)``. Some choices are deliberate:

* Zero points are by default *integers in the code range*. Zero is then always on the grid, so the
  many weights near zero keep their sign and lose nothing to an offset. Fractional ones exist for
  what has no special zero: SpQR's published variant, and the statistics of a grid.
* A scale is rounded to what is stored *before* codes are chosen, so that codes are nearest to what
  will really be decoded.
* Decoding is one subtraction and one multiplication in float32, each rounded once, so every device
  decodes the same numbers. With a float16 scale and a whole zero point it is even exact.

Scales and zero points may be stored as codes themselves: a `Statistic` is a matrix of them on a
second grid (SpQR, arXiv 2306.03078, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.core.spec import GroupAxis
from quantine.errors import SolverError

SMALLEST_SCALE: Final = 2.0**-24
"""Smallest positive float16; a scale never rounds down to zero."""
LARGEST_SCALE: Final = 65504.0
"""Largest finite float16."""
SMALLEST_NORMAL: Final = 2.0**-14
"""Smallest float16 with full precision."""
SMALLEST_STEP: Final = 2.0**-15
"""Smallest step of a second grid, as a share of its values' magnitude."""
NARROW: Final = 2.0**-10
"""A range below this share of its values' magnitude is stored as one float16 value."""


@dataclass(frozen=True)
class Grid:
    """A fitted affine map over groups of ``group_size`` consecutive weights of a line.

    Attributes:
        scale: ``[lines, groups]``: float16, positive in a weight's grid; or a `Statistic`.
        zero_point: ``[lines, groups]``: uint8 in the code range, or float16, or a `Statistic`;
            ``None`` for a symmetric grid, whose zero point is ``2**(bits - 1)`` everywhere.
        bits: bits of a code.
        group_size: weights per group, positive; the last group may be shorter.
        axis: lines are rows (``"in"``) or columns (``"out"``), see `QuantSpec`.
        sizes: weights of each group, where they differ; ``group_size`` then means nothing.
    """

    scale: Tensor | Statistic
    zero_point: Tensor | Statistic | None
    bits: int
    group_size: int
    axis: GroupAxis = "in"
    sizes: tuple[int, ...] = ()

    def scales(self) -> Tensor:
        """Scales as float32 ``[lines, groups]``."""
        return _values(self.scale)

    def zeros(self) -> Tensor:
        """Zero points as float32 ``[lines, groups]``, symmetric grids included."""
        if self.zero_point is None:
            return torch.full_like(self.scales(), 2 ** (self.bits - 1))
        return _values(self.zero_point)

    def lengths(self, length: int) -> tuple[int, ...]:
        """Weights of each group of a line of ``length``."""
        if self.sizes:
            return self.sizes
        starts = range(0, length, self.group_size)
        return tuple(min(self.group_size, length - start) for start in starts)

    def encode(self, x: Tensor) -> Tensor:
        """Nearest codes of ``x`` ``[rows, columns]`` float, as uint8 of the same shape."""
        if self.sizes:
            scale, zero = self._spread(self.scales()), self._spread(self.zeros())
            return encode(x.unsqueeze(-1), scale, zero, self.bits).squeeze(-1).to(torch.uint8)
        lines = self._lines(x)
        codes = encode(_grouped(lines, self.group_size), self.scales(), self.zeros(), self.bits)
        return self._lines(codes.to(torch.uint8).flatten(1)[:, : lines.shape[1]])

    def decode(self, codes: Tensor) -> Tensor:
        """Values of ``codes`` ``[rows, columns]`` uint8, as float32 of the same shape."""
        if self.sizes:
            scale, zero = self._spread(self.scales()), self._spread(self.zeros())
            return decode(codes.unsqueeze(-1), scale, zero).squeeze(-1)
        lines = self._lines(codes)
        values = decode(_grouped(lines, self.group_size), self.scales(), self.zeros())
        return self._lines(values.flatten(1)[:, : lines.shape[1]])

    def rows(self, chosen: Tensor) -> Grid:
        """The grid of the rows at int64 indices ``chosen``, with float32 statistics.

        Where lines are columns, rows of any order form no groups: each is a group of its own.
        """
        if self.axis == "in":
            zero = None if self.zero_point is None else self.zeros()[chosen]
            scale = self.scales()[chosen]
            return Grid(scale, zero, self.bits, self.group_size, sizes=self.sizes)
        groups = chosen // self.group_size
        zero = None if self.zero_point is None else self.zeros()[:, groups]
        return Grid(self.scales()[:, groups], zero, self.bits, 1, "out")

    def _spread(self, statistic: Tensor) -> Tensor:
        """A statistic ``[lines, groups]`` of each weight ``[lines, columns]``."""
        return statistic.repeat_interleave(torch.tensor(self.sizes), 1)

    def _lines(self, x: Tensor) -> Tensor:
        """A matrix as its lines, or lines as their matrix."""
        return x if self.axis == "in" else x.T


@dataclass(frozen=True)
class Statistic:
    """A matrix ``[lines, groups]`` of scales or zero points, stored as codes of a second grid.

    Attributes:
        codes: ``[groups, lines]`` uint8: transposed, for the values of neighbouring lines in one
            group are alike.
        grid: over runs of lines, with float16 zero points.
    """

    codes: Tensor
    grid: Grid

    def values(self) -> Tensor:
        """The statistics as float32 ``[lines, groups]``."""
        return self.grid.decode(self.codes).T


def encode(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of ``groups`` ``[..., n]``, one ``scale`` and ``zero`` ``[...]`` each; float32."""
    codes = torch.div(groups, scale.unsqueeze(-1)).add_(zero.unsqueeze(-1))
    return codes.round_().clamp_(0, 2**bits - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values of ``codes`` ``[..., n]``, one ``scale`` and ``zero`` ``[...]`` each; float32."""
    return (codes.float() - zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))


def fit_range(low: Tensor, high: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point of the grid that covers ``[min(low, 0), max(high, 0)]``.

    Args:
        low, high: float32 of one shape, the ends of each group's range.

    Returns:
        ``(scale, zero)`` float32 of that shape: scales exactly representable in float16, zeros
        whole numbers in the code range.

    Raises:
        SolverError: a scale is not finite in float16.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    middle = 2 ** (bits - 1)
    if sym:
        scale = to_float16(torch.maximum(high / (top - middle), -low / middle))
        return scale, torch.full_like(scale, middle)
    scale = to_float16((high - low) / top)
    return scale, (-low / scale).round_().clamp_(0, top)


def fit_fractional(low: Tensor, high: Tensor, bits: int, farthest: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid from ``low`` to ``high``, as in SpQR's published code.

    Two ranges differ from it. One whose distance from zero is at least ``farthest`` times its
    width is extended to zero: rounding a large zero point, or the scale it is multiplied with,
    would cost more than the whole width. That includes ranges of one value, which loses nothing.
    And no scale is below the smallest float16.

    Returns:
        ``(scale, zero)`` float32, not rounded; decoding ``0`` gives ``low``, the top code
        ``high``.
    """
    distant = high - low <= torch.maximum(low.abs(), high.abs()) / farthest
    low = torch.where(distant, low.clamp(max=0), low)
    high = torch.where(distant, high.clamp(min=0), high)
    scale = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST_SCALE)
    return scale, -low / scale


def fit_statistic(values: Tensor, bits: int, group_size: int) -> Statistic:
    """``values`` ``[groups, lines]`` float32 on a second grid from min to max.

    Raises:
        SolverError: a value or its range is not finite in float16.
    """
    rows = values.shape[1]
    padded = _grouped(values, group_size, fill_last=True)
    low, high = padded.aminmax(dim=-1)
    reach = torch.maximum(low.abs(), high.abs())
    # Float16 must hold the step, and then the zero point.
    least = (reach * SMALLEST_STEP).clamp_(min=SMALLEST_SCALE)
    step = _half_above(torch.maximum((high - low) / (2**bits - 1), least))
    zero = finite_half(-low / step)
    # Too narrow for float16 to tell its ends apart: one value, as the step from a zero at -1.
    single = (high - low <= NARROW * reach) & (reach >= SMALLEST_SCALE)
    step = torch.where(single, finite_half(low), step)
    zero = zero.masked_fill_(single, -1.0)
    codes = encode(padded, step, zero, bits).to(torch.uint8).flatten(1)[:, :rows]
    return Statistic(codes, Grid(step.half(), zero.half(), bits, group_size))


def to_float16(scale: Tensor) -> Tensor:
    """Positive ``scale`` rounded to float16 values, in float32.

    Raises:
        SolverError: one is too large.
    """
    if not bool((scale <= LARGEST_SCALE).all()):
        raise SolverError(
            f"a group needs a scale of {scale.max().item():.4g}, but scales are stored in float16 "
            f"(at most {LARGEST_SCALE:g}): rescale the weights, or leave this layer in 16 bit"
        )
    return scale.clamp(min=SMALLEST_SCALE).half().float()


def finite_half(values: Tensor) -> Tensor:
    """``values`` of any sign rounded to float16, in float32.

    Raises:
        SolverError: one is too large.
    """
    rounded = values.half().float()
    if not bool(torch.isfinite(rounded).all()):
        raise SolverError(
            f"a statistic of {values.abs().max().item():.4g} does not fit into float16: rescale "
            "the weights, or leave this layer in 16 bit"
        )
    return rounded


def _half_above(step: Tensor) -> Tensor:
    """Positive ``step`` rounded to float16, in float32: not down where float16 is coarse."""
    subnormal = (step / SMALLEST_SCALE).ceil_().mul_(SMALLEST_SCALE)
    return torch.where(step < SMALLEST_NORMAL, subnormal, finite_half(step))


def _values(stored: Tensor | Statistic) -> Tensor:
    return stored.values() if isinstance(stored, Statistic) else stored.float()


def _grouped(x: Tensor, group_size: int, fill_last: bool = False) -> Tensor:
    """``x`` ``[rows, columns]`` as ``[rows, groups, group_size]``, padded to whole groups."""
    missing = -x.shape[1] % group_size
    if missing:
        fill = x[:, -1:] if fill_last else x.new_zeros(1, 1)
        x = torch.cat([x, fill.expand(len(x), missing)], 1)
    return torch.unflatten(x, 1, (-1, group_size))
