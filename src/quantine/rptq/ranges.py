"""The range of a cluster of channels that costs least once values are rounded to it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.fit_range import fit_activations
from quantine.core.grid import decode, encode
from quantine.statistics.channel_ranges import ChannelRanges

SHARES: Final = (2.0, 1.75, 1.5, 1.25, 1.1, *(0.95 - 0.05 * step for step in range(14)))
"""Candidates for an end's distance from zero, or from the other end, besides what was seen: text
that comes later goes beyond it now and then."""
MARGIN: Final = 0.25
"""Share by which ends are moved out where steps are small and what lies beyond an end is dear."""


def widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Ends farther from zero by `MARGIN`, or from the middle of a range that does not reach zero.

    An end at zero stays there: values that were never negative will not be.
    """
    within = (low <= 0) & (high >= 0)
    centre = torch.where(within, 0.0, (low + high) / 2)
    return low + (low - centre) * MARGIN, high + (high - centre) * MARGIN


def through(values: Tensor, scale: Tensor, zero: Tensor, labels: Tensor) -> Tensor:
    """Zero points with which ``values`` are on steps of their grids.

    They are no whole numbers then. The values of channels of one cluster are averaged.

    Args:
        values: ``[channels]`` float32.
        scale, zero: ``[clusters]`` float32.
        labels: ``[channels]`` int64.

    Returns:
        ``[clusters]`` float32, within half a step of ``zero``.
    """
    means = torch.zeros_like(scale).index_add_(0, labels, values) / labels.bincount()
    steps = means / scale
    return (steps + zero).round_() - steps


def cheapest_ranges(
    seen: ChannelRanges, importance: Tensor, labels: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range of each cluster with the least expected error.

    Ranges are shares of what was seen, both ends moved together, then each alone. To the error of
    the tokens that were kept comes what is lost beyond the range. That is estimated as if each
    sample were new: ends are then nearer by what only this sample had shown of a channel.

    Args:
        seen: values to be rounded.
        importance: ``[channels]`` float32: cost of a channel's squared error.
        labels: ``[channels]`` int64, the cluster of each channel.
        bits: of a code.

    Returns:
        ``[clusters]`` float32 each.
    """
    low, high = seen.of_clusters(labels)
    centre = torch.zeros_like(low).clamp(low, high)
    below, above = seen.surprises()
    weight = seen.tokens / len(seen.rows)
    shares = low.new_ones(2, len(low))  # of the lower and the upper end

    def ends(of: Tensor) -> tuple[Tensor, Tensor]:
        return centre + (low - centre) * of[0], centre + (high - centre) * of[1]

    def cost(of: Tensor) -> Tensor:
        least, most = ends(of)
        scale, zero = (value[labels] for value in fit_activations(least, most, bits))
        codes = encode(seen.rows, scale, zero, bits)
        errors = decode(codes, scale, zero).sub_(seen.rows).square_().sum(0) * weight
        wider = of.clamp(min=1)[:, labels]
        lost = (least[labels] + below * wider[0] - seen.lows).clamp_(min=0).square_()
        lost += (seen.highs - most[labels] + above * wider[1]).clamp_(min=0).square_()
        errors += lost.sum(0)
        return torch.zeros_like(low).index_add_(0, labels, errors * importance)

    least = cost(shares)
    for moved in ((0, 1), (0,), (1,)):
        start = shares.clone()
        for share in SHARES:
            tried = start.clone()
            for end in moved:
                tried[end] = start[end] * share
            found = cost(tried)
            better = found < least
            least = torch.where(better, found, least)
            shares = torch.where(better, tried, shares)
    return fit_activations(*ends(shares), bits)
