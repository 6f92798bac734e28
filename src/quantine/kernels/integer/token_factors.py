"""A factor for each token, by which its activations are divided before they are rounded.

Static grids must cover the few tokens with the largest activations, and most tokens use only a
small part of them. With factors, the grids of RPTQ's clusters only say how the ranges of channels
compare, and each token's factor stretches its values over them. What codes stand for is multiplied
by the factor again.

Factors are bounded: a channel that was never active during calibration has next to no range, and
if it is active later, its token's factor must not become so large that all other channels of the
token are rounded away.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

SMALLEST: Final = 1e-30
"""Smallest factor, so that a token of zeros is not divided by zero."""
LARGEST: Final = 4.0
"""Largest factor: values of a token that would need a larger one are clipped."""
FINITE: Final = torch.finfo(torch.float32).max
"""Magnitude that replaces infinity before a product, as infinity times 0 would be NaN."""


def steepness(scale: Tensor, zero: Tensor, bits: int, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers that turn a token's values into the factors each of them asks for.

    A value on the end of its channel's grid asks for the factor ``reach``. `factors` takes the
    largest that any channel asks for.

    Args:
        scale, zero: float32 of one shape, the grids; zero points lie in the code range.
        bits: number of bits of one code.
        reach: ``[1]`` float32: 1 divides a token so that its largest value, relative to its grid,
            lies on the grid's end; below 1 that value is clipped, and the others get finer steps.

    Returns:
        ``(above, below)`` float32 of the same shape: ``reach`` divided by the upper and by the
        lower end of each grid, for positive and negative values; 0 where the grid has no values of
        that sign.
    """
    top = 2**bits - 1
    high, low = (top - zero) * scale, -zero * scale
    nothing = torch.zeros_like(scale)
    above = torch.where(high > 0, reach / high, nothing)
    return above, torch.where(low < 0, reach / low, nothing)


def factors(x: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """The factor of each token, between `SMALLEST` and `LARGEST`.

    Args:
        x: ``[..., channels]`` float32, one token in the last dimension.
        above, below: float32, broadcastable to ``x``, from `steepness`.

    Returns:
        ``[..., 1]`` float32.
    """
    finite = x.clamp(-FINITE, FINITE)
    largest = torch.maximum(finite * above, finite * below).amax(-1, keepdim=True)
    return largest.clamp_(SMALLEST, LARGEST)
