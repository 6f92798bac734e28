"""A factor for each token, by which its values are divided before they meet static grids.

Clusters say how ranges of channels compare, the factor how loud a token is: most are far from the
ranges that a few loud ones need.

Factors have a limit: a channel that never was active while grids were found has next to no range,
and when it is active after all, it must not take the steps of all others.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

SMALLEST: Final = 1e-30
"""Least factor: a token of zeros stays one."""
LARGEST: Final = 4.0
"""Largest one: what a token has beyond that is clipped."""
FINITE: Final = torch.finfo(torch.float32).max
"""Infinite values are taken for these, so that none of them times 0 is no number."""


def steepness(scale: Tensor, zero: Tensor, bits: int, reach: Tensor) -> tuple[Tensor, Tensor]:
    """What a token's values are multiplied by to find its factor.

    Args:
        scale, zero: float32 of one shape; zero points in the code range.
        bits: of a code.
        reach: ``[1]`` float32: the share of the largest value, in units of the ends of its grid,
            that is to lie on such an end; what is larger will be clipped.

    Returns:
        For values above zero, and for those below: ``reach`` over the ends of the grid, float32 of
        that shape; 0 where the grid has nothing on that side.
    """
    top = 2**bits - 1
    high, low = (top - zero) * scale, -zero * scale
    nothing = torch.zeros_like(scale)
    above = torch.where(high > 0, reach / high, nothing)
    return above, torch.where(low < 0, reach / low, nothing)


def factors(x: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """The factor of each token of ``x`` ``[..., channels]`` float32: ``[..., 1]`` float32.

    Args:
        above, below: of channels, from `steepness`.
    """
    finite = x.clamp(-FINITE, FINITE)
    largest = torch.maximum(finite * above, finite * below).amax(-1, keepdim=True)
    return largest.clamp_(SMALLEST, LARGEST)
