"""A factor for each token, by which its values are divided before they meet static grids.

Clusters say how ranges of channels compare, the factor how loud a token is: most are far from the
ranges that a few loud ones need.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

SMALLEST: Final = 1e-30
"""Least factor: a token of zeros stays one."""


def steepness(
    scale: Tensor, zero: Tensor, bits: int, reach: float | Tensor
) -> tuple[Tensor, Tensor]:
    """What a token's values are multiplied by to find its factor.

    Args:
        scale, zero: float32 of one shape; zero points in the code range.
        bits: of a code.
        reach: the share of the largest value, in units of the ends of its grid, that is to lie on
            such an end; what is larger will be clipped. As a tensor: ``[1]``.

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
    return torch.maximum(x * above, x * below).amax(-1, keepdim=True).clamp_(min=SMALLEST)
