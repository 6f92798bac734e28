"""The affine grid: the only rounding in the project.

A group of values is stored as integer codes ``q`` in ``[0, 2**bits - 1]`` and decoded as
``scale * (q - zero_point)``. Some choices are deliberate:

* Zero points are by default *integers in the code range*. Zero is then always on the grid, so the
  many weights near zero keep their sign and lose nothing to an offset. Fractional zero points exist
  for values to which zero is nothing special: SpQR's published variant, and scales and zero points
  themselves.
* A scale is rounded to what is stored *before* codes are chosen, so that each code is the nearest
  to what will really be decoded.
* Grids of other engines may have signed scales, or a free minimum that is subtracted instead of a
  zero point (`Grid.minimum`). They are fitted by `quantine.kernels.fit.block_grids`.
* Decoding is one subtraction and one multiplication in float32, each rounded once, so every device
  decodes the same numbers. With a float16 scale and an integer zero point it is even exact.

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
    """Scales and zero points of a matrix, one of each per group of consecutive weights of a line.

    A line is a row of the matrix, or a column where groups run along outputs.

    Attributes:
        scale: ``[lines, groups]``: float16, positive in the grid of a weight unless its spec is
            signed; or a `Statistic`.
        zero_point: ``[lines, groups]``: uint8 in the code range, float16, or a `Statistic`.
            ``None`` for a symmetric grid, whose zero point is ``2**(bits - 1)`` everywhere.
        bits: number of bits of one code, 2 to 8.
        group_size: number of weights per group, positive; the last group may be shorter.
        axis: ``"in"`` where lines are rows, ``"out"`` where they are columns, as
            `quantine.core.spec.QuantSpec.group_axis`.
        sizes: number of weights of each group, where groups differ in size; ``group_size`` is then
            not used. Empty otherwise.
        exponent: scales are ``2**exponent`` times what ``scale`` holds. It is 0 but for weights
            that are too small for scales in float16.
        minimum: ``[lines, groups]`` float16 or a `Statistic`: what is subtracted from ``scale *
            code``, in grids that have this instead of zero points; else ``None``.
    """

    scale: Tensor | Statistic
    zero_point: Tensor | Statistic | None
    bits: int
    group_size: int
    axis: GroupAxis = "in"
    sizes: tuple[int, ...] = ()
    exponent: int = 0
    minimum: Tensor | Statistic | None = None

    def scales(self) -> Tensor:
        """The scales, decoded if they are stored as codes, as float32 ``[lines, groups]``."""
        found = _values(self.scale)
        return found * 2.0**self.exponent if self.exponent else found

    def zeros(self) -> Tensor:
        """The zero points as float32 ``[lines, groups]``, also those a symmetric grid implies.

        A minimum is one that is a fraction, up to float rounding.
        """
        if self.minimum is not None:
            return _values(self.minimum) / self.scales()
        if self.zero_point is None:
            return torch.full_like(self.scales(), 2 ** (self.bits - 1))
        return _values(self.zero_point)

    def lengths(self, length: int) -> tuple[int, ...]:
        """Number of weights of each group of a line of ``length`` weights."""
        if self.sizes:
            return self.sizes
        starts = range(0, length, self.group_size)
        return tuple(min(self.group_size, length - start) for start in starts)

    def encode(self, x: Tensor) -> Tensor:
        """Round ``x`` ``[rows, columns]`` float to its nearest codes, uint8 of the same shape."""
        if self.sizes:
            scale, zero = self._of_weights(self.scales()), self._of_weights(self.zeros())
            return encode(x, scale, zero, self.bits).to(torch.uint8)
        lines = self._lines(x)
        scale, zero = self.scales().unsqueeze(-1), self.zeros().unsqueeze(-1)
        codes = encode(grouped(lines, self.group_size), scale, zero, self.bits)
        return self._lines(codes.to(torch.uint8).flatten(1)[:, : lines.shape[1]])

    def decode(self, codes: Tensor) -> Tensor:
        """The values of ``codes`` ``[rows, columns]`` uint8, as float32 of the same shape."""
        if self.sizes:
            return decode(codes, self._of_weights(self.scales()), self._of_weights(self.zeros()))
        lines = self._lines(codes)
        scale, groups = self.scales().unsqueeze(-1), grouped(lines, self.group_size)
        if self.minimum is not None:
            values = groups.float().mul_(scale).sub_(_values(self.minimum).unsqueeze(-1))
        else:
            values = decode(groups, scale, self.zeros().unsqueeze(-1))
        return self._lines(values.flatten(1)[:, : lines.shape[1]])

    def rows(self, chosen: Tensor) -> Grid:
        """The grid of some rows of the matrix, with scales and zero points in float32.

        Where lines are columns, the chosen rows need not be neighbours and so form no groups: each
        row becomes a group of its own.

        Args:
            chosen: int64 indices of the rows.
        """
        if self.axis == "in":
            zero = None if self.zero_point is None else self.zeros()[chosen]
            minimum = None if self.minimum is None else _values(self.minimum)[chosen]
            scale, sizes = self.scales()[chosen], self.sizes
            return Grid(scale, zero, self.bits, self.group_size, sizes=sizes, minimum=minimum)
        groups = chosen // self.group_size
        zero = None if self.zero_point is None else self.zeros()[:, groups]
        return Grid(self.scales()[:, groups], zero, self.bits, 1, "out")

    def _of_weights(self, statistic: Tensor) -> Tensor:
        """Repeat scales or zeros ``[lines, groups]`` for each weight, ``[lines, columns]``."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64, device=statistic.device)
        return statistic.repeat_interleave(sizes, 1)

    def _lines(self, x: Tensor) -> Tensor:
        """Turn a matrix into its lines, or lines into their matrix: a transpose for ``"out"``."""
        return x if self.axis == "in" else x.T


@dataclass(frozen=True)
class Statistic:
    """The scales, or the zero points, of a matrix, stored as codes of second grids.

    Attributes:
        codes: ``[groups, lines]`` uint8. They are transposed because the statistics of one group in
            neighbouring lines are alike, and share a second grid.
        grid: the second grids, over runs of consecutive lines, with float16 zero points; or, with
            ``axis`` ``"out"``, over runs of consecutive groups of one line.
    """

    codes: Tensor
    grid: Grid

    def values(self) -> Tensor:
        """The decoded scales or zero points as float32 ``[lines, groups]``."""
        return self.grid.decode(self.codes).T

    @classmethod
    def along_lines(cls, codes: Tensor, step: Tensor, bits: int, run: int, sym: bool) -> Statistic:
        """Statistics that are multiples of one float16 for each run of groups of a line.

        Args:
            codes: ``[groups, lines]`` uint8.
            step: ``[lines, runs]`` float16.
            bits: number of bits of one code.
            run: number of consecutive groups that share a step.
            sym: whether the middle code stands for 0, instead of code 0.
        """
        zero = None if sym else torch.zeros_like(step)
        return cls(codes, Grid(step, zero, bits, run, "out"))


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes of ``x`` on a grid: the rounding that the whole project uses.

    Args:
        x: floats to be rounded.
        scale, zero: of one shape that broadcasts with ``x``; scales must not be zero.
        bits: number of bits of one code, 2 to 8.

    Returns:
        Integers from 0 to ``2**bits - 1``, in the dtype of ``x``.
    """
    return torch.div(x, scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def encode_up_to(x: Tensor, scale: Tensor, zero: Tensor, tops: Tensor) -> Tensor:
    """`encode` where values have different numbers of bits.

    Args:
        x, scale, zero: as of `encode`.
        tops: the largest code of each value, in the dtype of ``x``; broadcasts with it.

    Returns:
        Integers from 0 to ``tops``, in the dtype of ``x``.
    """
    return torch.div(x, scale).add_(zero).round_().clamp_(min=0).minimum(tops)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The values of ``codes``: ``scale * (codes - zero)`` in float32; shapes broadcast."""
    return (codes.float() - zero).mul_(scale)


def _values(stored: Tensor | Statistic) -> Tensor:
    return stored.values() if isinstance(stored, Statistic) else stored.float()


def grouped(x: Tensor, group_size: int, fill_last: bool = False) -> Tensor:
    """Split the rows of ``x`` ``[rows, columns]`` into groups: ``[rows, groups, group_size]``.

    A last group that is not full is padded.

    Args:
        x: a matrix of any dtype.
        group_size: number of columns per group.
        fill_last: pad with the last value of each row instead of zeros.
    """
    missing = -x.shape[1] % group_size
    if missing:
        fill = x[:, -1:] if fill_last else x.new_zeros(1, 1)
        x = torch.cat([x, fill.expand(len(x), missing)], 1)
    return torch.unflatten(x, 1, (-1, group_size))
