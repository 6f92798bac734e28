"""The affine grid: the only rounding in the project.

A group of values is stored as integer codes ``q`` in ``[0, 2**bits - 1]`` and decoded as
``scale * (q - zero_point)``. Two choices are deliberate:

* The zero point is an *integer in the code range*. Zero is then always on the grid, so the many
  weights near zero keep their sign and lose nothing to an offset; a float zero point fitted to
  min and max is worse by more than a factor of two in perplexity at 3 bits and costs more bits.
* The scale is rounded to float16 *before* codes are chosen, so that codes are nearest to what
  will really be decoded. ``scale * (q - zero_point)`` has at most 11 + 9 significant bits and is
  therefore exact in float32: every device decodes the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.errors import SolverError

SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16; a scale never rounds down to zero."""
LARGEST_SCALE = 65504.0
"""Largest finite float16."""


@dataclass(frozen=True)
class Grid:
    """A fitted affine map over groups of ``group_size`` consecutive columns.

    Attributes:
        scale: ``[rows, groups]`` float16, positive.
        zero_point: ``[rows, groups]`` uint8 in the code range; ``None`` for a symmetric grid,
            whose zero point is ``2**(bits - 1)`` everywhere.
        bits: bits of a code.
        group_size: columns per group, positive.
    """

    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int

    def zeros(self) -> Tensor:
        """Zero points as float32 ``[rows, groups]``, symmetric grids included."""
        if self.zero_point is None:
            return torch.full_like(self.scale, 2 ** (self.bits - 1), dtype=torch.float32)
        return self.zero_point.float()

    def encode(self, x: Tensor) -> Tensor:
        """Nearest codes of ``x`` ``[rows, columns]`` float, as uint8 of the same shape."""
        grouped = _grouped(x, self.group_size)
        return encode(grouped, self.scale.float(), self.zeros(), self.bits).view(x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of ``codes`` ``[rows, columns]`` uint8, as float32 of the same shape."""
        grouped = _grouped(codes, self.group_size)
        return decode(grouped, self.scale.float(), self.zeros()).view(codes.shape)


def encode(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of ``groups`` ``[..., n]``, one ``scale`` and ``zero`` ``[...]`` each; uint8."""
    codes = torch.div(groups, scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1))
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values of ``codes`` ``[..., n]``, one ``scale`` and ``zero`` ``[...]`` each; float32."""
    return (codes.float() - zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))


def fit_range(low: Tensor, high: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers ``[min(low, 0), max(high, 0)]``.

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
        scale = _float16_scale(torch.maximum(high / (top - middle), -low / middle))
        return scale, torch.full_like(scale, middle)
    scale = _float16_scale((high - low) / top)
    return scale, (-low / scale).round_().clamp_(0, top)


def fit_minmax(groups: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Grid from the smallest and largest value of each group ``[..., n]``: see `fit_range`."""
    low, high = groups.aminmax(dim=-1)
    return fit_range(low, high, bits, sym)


def _float16_scale(scale: Tensor) -> Tensor:
    if not bool((scale <= LARGEST_SCALE).all()):
        raise SolverError(
            f"a group needs a scale of {scale.max().item():.4g}, but scales are stored in float16 "
            f"(at most {LARGEST_SCALE:g}): rescale the weights, or leave this layer in 16 bit"
        )
    return scale.clamp(min=SMALLEST_SCALE).half().float()


def _grouped(x: Tensor, group_size: int) -> Tensor:
    return torch.unflatten(x, 1, (-1, group_size))
