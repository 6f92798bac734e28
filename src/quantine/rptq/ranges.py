"""Ranges of clusters of channels: widened, shifted, or searched for the least rounding error."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.fit_range import fit_activations
from quantine.core.grid import decode, encode
from quantine.statistics.channel_ranges import ChannelRanges

SHARES: Final = (2.0, 1.75, 1.5, 1.25, 1.1, *(0.95 - 0.05 * step for step in range(14)))
"""Candidate ranges, as multiples of an end's distance from zero (or from the end nearer to zero).
Some exceed 1, as other text will sometimes exceed the range seen in calibration."""
MARGIN: Final = 0.25
"""Share by which the ends of a range are moved out at 8 bits, where a larger step costs little and
clipping much."""


def widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Move the ends of ranges out by the share `MARGIN`.

    The distance is taken from zero, or from the middle of a range that does not hold zero. An end
    at zero stays there: values that were never negative in calibration are taken never to be.

    Args:
        low, high: ends of the ranges, float32 of one shape.

    Returns:
        The new ends, of the same shape.
    """
    within = (low <= 0) & (high >= 0)
    centre = torch.where(within, 0.0, (low + high) / 2)
    return low + (low - centre) * MARGIN, high + (high - centre) * MARGIN


def through(values: Tensor, scale: Tensor, zero: Tensor, labels: Tensor) -> Tensor:
    """Shift zero points so that the grids represent ``values`` exactly.

    Zero points are then no longer whole numbers. Where a cluster has several channels, its grid
    represents the mean of their values.

    Args:
        values: ``[channels]`` float32, one value for each channel.
        scale, zero: ``[clusters]`` float32, the grids.
        labels: ``[channels]`` int64, the cluster of each channel.

    Returns:
        Zero points ``[clusters]`` float32, within 0.5 of ``zero``.
    """
    means = torch.zeros_like(scale).index_add_(0, labels, values) / labels.bincount()
    steps = means / scale
    return (steps + zero).round_() - steps


def cheapest_ranges(
    seen: ChannelRanges, importance: Tensor, labels: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Search the range of each cluster that has the least expected rounding error.

    Candidates are the calibration range times `SHARES`, for both ends together, then for each end
    alone. The error is that of the sampled tokens, plus that of clipping each sample's smallest and
    largest values. Clipping is estimated as if the sample were new text: the range is first
    narrowed by as much as this sample alone had extended it.

    Args:
        seen: the calibration values of all channels.
        importance: ``[channels]`` float32, weight of each channel's squared error.
        labels: ``[channels]`` int64, the cluster of each channel.
        bits: number of bits of one code, 2 to 8.

    Returns:
        Scale and zero point, ``[clusters]`` float32 each.
    """
    scale, zero, _ = cheapest_ranges_and_costs(seen, importance, labels, bits)
    return scale, zero


def cheapest_ranges_and_costs(
    seen: ChannelRanges, importance: Tensor, labels: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`cheapest_ranges`, and the expected error of each cluster, ``[clusters]`` float32."""
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
    return *fit_activations(*ends(shares), bits), least
