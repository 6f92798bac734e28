"""The range of a cluster of channels that costs least once values are rounded to it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import decode, encode

SHARES: Final = tuple(1.0 - 0.05 * step for step in range(15))
"""Candidate shares of an end's distance from zero, or from the other end: 1.0 down to 0.3."""
SMALLEST_STEP: Final = 1e-8
"""Least scale: a channel of one value still has a grid."""


def covering(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point of the grid from ``low`` to ``high``, float32 of one shape."""
    scale = ((high - low) / (2**bits - 1)).clamp_(min=SMALLEST_STEP)
    return scale, (-low / scale).round_()


def search(
    rows: Tensor, importance: Tensor, labels: Tensor, low: Tensor, high: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the share of each cluster's range with the least error.

    Both ends are drawn in together, then each alone.

    Args:
        rows: ``[n, channels]`` float32, values to be rounded.
        importance: ``[channels]`` float32: cost of a channel's squared error.
        labels: ``[channels]`` int64, the cluster of each channel.
        low, high: ``[clusters]`` float32, ends of the ranges.
        bits: of a code.

    Returns:
        ``[clusters]`` float32 each.
    """
    centre = torch.zeros_like(low).clamp(low, high)
    shares = torch.ones(2, len(low))  # of the lower and the upper end

    def ends(of: Tensor) -> tuple[Tensor, Tensor]:
        return centre + (low - centre) * of[0], centre + (high - centre) * of[1]

    def cost(of: Tensor) -> Tensor:
        scale, zero = (value[labels] for value in covering(*ends(of), bits))
        codes = encode(rows.unsqueeze(-1), scale, zero, bits)
        errors = decode(codes, scale, zero).squeeze(-1).sub_(rows).square_().sum(0)
        return torch.zeros_like(low).index_add_(0, labels, errors * importance)

    least = cost(shares)
    for moved in ((0, 1), (0,), (1,)):
        start = shares.clone()
        for share in SHARES[1:]:
            tried = start.clone()
            for end in moved:
                tried[end] = start[end] * share
            found = cost(tried)
            better = found < least
            least = torch.where(better, found, least)
            shares = torch.where(better, tried, shares)
    return covering(*ends(shares), bits)
