"""Numbers of bits for the channels of keys: more where a bit takes more of the error away.

Some channels of keys are hundred times as loud as others, and queries are as uneven. With as many
bits for each, most of the error is of few channels. A bit more quarters the error of its channel,
so bits go, two by two, to where they take most away (reverse water-filling of rate-distortion
theory), and channels that hardly count keep a constant.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.kernels.kv_attention.digits import DIGIT
from quantine.kernels.kv_attention.state_grid import LARGEST_WIDTH
from quantine.rptq.ranges import cheapest_ranges_and_costs
from quantine.statistics.channel_ranges import ChannelRanges

WIDTHS: Final = tuple(range(0, LARGEST_WIDTH + 1, DIGIT))
"""Numbers of bits that a channel may have."""


def mixed_grid(
    seen: ChannelRanges, importance: Tensor, labels: Tensor, bits: int, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Grids of different numbers of bits with the least expected rounding error.

    Args:
        seen: the calibration values of all channels.
        importance: ``[channels]`` float32, weight of each channel's squared error.
        labels: ``[channels]`` int64, the cluster of each channel; none has channels of two heads.
        bits: mean number of bits of the channels of a head.
        heads: number of heads, of as many channels each.

    Returns:
        Scale and zero point ``[clusters]`` float32, and bits ``[clusters]`` uint8, which are some
        of `WIDTHS`.
    """
    found = [_constant(seen, importance, labels)]
    found += [cheapest_ranges_and_costs(seen, importance, labels, width) for width in WIDTHS[1:]]
    scales, zeros, costs = (torch.stack(each) for each in zip(*found, strict=True))
    sizes = labels.bincount(minlength=scales.shape[1])
    head_of = labels.new_zeros(scales.shape[1])
    channels = torch.arange(len(labels), device=labels.device)
    head_of[labels] = channels // (len(labels) // heads)
    chosen = torch.zeros_like(head_of)
    for head in range(heads):
        own = (head_of == head).nonzero().flatten()
        digits = bits * (len(labels) // heads) // DIGIT
        chosen[own] = shared_out(costs[:, own].cpu(), sizes[own].cpu(), digits).to(own.device)
    at = chosen.unsqueeze(0)
    widths = torch.tensor(WIDTHS, dtype=torch.uint8, device=labels.device)[chosen]
    return scales.gather(0, at)[0], zeros.gather(0, at)[0], widths


def shared_out(costs: Tensor, sizes: Tensor, digits: int) -> Tensor:
    """Share digits out among clusters, each time to the one whose error falls most for them.

    Args:
        costs: ``[1 + most digits, clusters]``, the error with so many digits for each channel.
        sizes: ``[clusters]`` int64, number of channels of each, which get as many digits each.
        digits: how many there are.

    Returns:
        ``[clusters]`` int64: digits of each channel; together ``digits`` at most.
    """
    chosen = torch.zeros_like(sizes)
    left = digits
    while True:
        # A channel whose second digit helps more than its first is asked for both at once.
        best, gain = None, 0.0
        for count in range(1, len(costs)):
            after = (chosen + count).clamp(max=len(costs) - 1)
            price = (after - chosen) * sizes
            now = costs.gather(0, chosen.unsqueeze(0))[0]
            gains = (now - costs.gather(0, after.unsqueeze(0))[0]) / price.clamp(min=1)
            gains[(price == 0) | (price > left)] = 0.0
            most = int(gains.argmax())
            if float(gains[most]) > gain:
                best, gain = (most, int(after[most])), float(gains[most])
        if best is None:
            return chosen
        left -= int((best[1] - chosen[best[0]]) * sizes[best[0]])
        chosen[best[0]] = best[1]


def _constant(
    seen: ChannelRanges, importance: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The grid of one value for each cluster, the mean of what was seen, and its error.

    As for other grids, the smallest and the largest value of each sample count beside sampled
    tokens: the first token of a text may be louder than all others.
    """
    sizes = labels.bincount()
    means = torch.zeros_like(sizes, dtype=torch.float32).index_add_(0, labels, seen.rows.mean(0))
    means /= sizes
    off = (seen.rows - means[labels]).square_().mean(0) * seen.tokens
    for ends in (seen.lows, seen.highs):
        off += (ends - means[labels]).square_().sum(0)
    costs = torch.zeros_like(means).index_add_(0, labels, off * importance)
    # Code 0 stands for ``-scale * zero``.
    return torch.ones_like(means), -means, costs
