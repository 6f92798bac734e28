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

import torch
from torch import Tensor

from quantine.core.spec import GroupAxis


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
            scale, zero = self._of_weights(self.scales()), self._of_weights(self.zeros())
            return encode(x, scale, zero, self.bits).to(torch.uint8)
        lines = self._lines(x)
        scale, zero = self.scales().unsqueeze(-1), self.zeros().unsqueeze(-1)
        codes = encode(grouped(lines, self.group_size), scale, zero, self.bits)
        return self._lines(codes.to(torch.uint8).flatten(1)[:, : lines.shape[1]])

    def decode(self, codes: Tensor) -> Tensor:
        """Values of ``codes`` ``[rows, columns]`` uint8, as float32 of the same shape."""
        if self.sizes:
            return decode(codes, self._of_weights(self.scales()), self._of_weights(self.zeros()))
        lines = self._lines(codes)
        scale, zero = self.scales().unsqueeze(-1), self.zeros().unsqueeze(-1)
        values = decode(grouped(lines, self.group_size), scale, zero)
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

    def _of_weights(self, statistic: Tensor) -> Tensor:
        """A statistic ``[lines, groups]`` for each weight ``[lines, columns]``."""
        sizes = torch.tensor(self.sizes, device=statistic.device)
        return statistic.repeat_interleave(sizes, 1)

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


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes of ``x`` on a grid: the rounding of the whole project.

    Args:
        x: floats.
        scale, zero: of one shape, to which the shape of ``x`` broadcasts; scales are not zero.
        bits: bits of a code.

    Returns:
        Whole numbers from 0 to ``2**bits - 1``, in the dtype of ``x``.
    """
    return torch.div(x, scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What ``codes`` stand for: ``scale * (codes - zero)``, float32; shapes broadcast."""
    return (codes.float() - zero).mul_(scale)


def _values(stored: Tensor | Statistic) -> Tensor:
    return stored.values() if isinstance(stored, Statistic) else stored.float()


def grouped(x: Tensor, group_size: int, fill_last: bool = False) -> Tensor:
    """``x`` ``[rows, columns]`` as ``[rows, groups, group_size]``, padded to whole groups.

    Args:
        fill_last: pad with the last value of each row instead of zeros.
    """
    missing = -x.shape[1] % group_size
    if missing:
        fill = x[:, -1:] if fill_last else x.new_zeros(1, 1)
        x = torch.cat([x, fill.expand(len(x), missing)], 1)
    return torch.unflatten(x, 1, (-1, group_size))
