"""Ranges of the channels of an activation, observed on calibration text."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

Over = Literal["all", "mean", "running"]
"""Name of a way to combine samples into one range, see `ChannelRanges.of_clusters`."""


NEWEST: Final = 0.01
"""Weight of the newest sample in running averages, as in RPTQ's published code."""


ROWS_PER_SAMPLE: Final = 16
"""Largest number of tokens per sample whose values are kept."""


class ChannelRanges:
    """Smallest and largest value of every channel in each calibration sample, and some values.

    Args:
        channels: number of channels.
        device: where statistics are kept; must be that of the values.

    Attributes:
        lows, highs: ``[samples, channels]`` float32, smallest and largest values.
        firsts: ``[samples, channels]`` float32, the first token of each sample.
        rows: ``[n, channels]`` float32, up to `ROWS_PER_SAMPLE` evenly spaced tokens of each
            sample.
        tokens: number of tokens in all samples.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        nothing = torch.empty(0, channels, dtype=torch.float32, device=device)
        self.lows = self.highs = self.firsts = self.rows = nothing
        self.tokens = 0

    def update(self, x: Tensor, samples: int) -> None:
        """Add the values of some samples.

        Args:
            x: ``[..., channels]``, the tokens of one sample after those of another.
            samples: number of samples in ``x``, of the same number of tokens each.
        """
        rows = x.detach().float().reshape(samples, -1, x.shape[-1])
        self.lows = torch.cat([self.lows, rows.amin(1)])
        self.highs = torch.cat([self.highs, rows.amax(1)])
        self.firsts = torch.cat([self.firsts, rows[:, 0]])
        step = max(1, rows.shape[1] // ROWS_PER_SAMPLE)
        kept = rows[:, step - 1 :: step][:, :ROWS_PER_SAMPLE]
        self.rows = torch.cat([self.rows, kept.flatten(0, 1)])
        self.tokens += rows.shape[0] * rows.shape[1]

    def merge(self, other: ChannelRanges) -> None:
        """Add all that ``other`` has seen; its samples come after those of this one."""
        self.lows = torch.cat([self.lows, other.lows])
        self.highs = torch.cat([self.highs, other.highs])
        self.firsts = torch.cat([self.firsts, other.firsts])
        self.rows = torch.cat([self.rows, other.rows])
        self.tokens += other.tokens

    def to(self, device: torch.device | str) -> ChannelRanges:
        """The statistics on another device."""
        result = ChannelRanges(self.lows.shape[1], device)
        result.lows, result.highs = self.lows.to(device), self.highs.to(device)
        result.firsts, result.rows = self.firsts.to(device), self.rows.to(device)
        result.tokens = self.tokens
        return result

    def of_channels(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of each channel's range over all samples, ``[channels]`` float32."""
        return self.lows.amin(0), self.highs.amax(0)

    def after(self, samples: int) -> ChannelRanges:
        """The statistics without the first ``samples`` samples."""
        share = samples / len(self.lows)
        result = ChannelRanges(self.lows.shape[1], self.lows.device)
        result.lows, result.highs = self.lows[samples:], self.highs[samples:]
        result.firsts = self.firsts[samples:]
        result.rows = self.rows[round(len(self.rows) * share) :]
        result.tokens = self.tokens - round(self.tokens * share)
        return result

    def ordered(self, order: Tensor) -> ChannelRanges:
        """The statistics with channels in another order: place ``j`` gets channel ``order[j]``."""
        result = ChannelRanges(len(order), self.lows.device)
        result.lows, result.highs = self.lows[:, order], self.highs[:, order]
        result.firsts = self.firsts[:, order]
        result.rows, result.tokens = self.rows[:, order], self.tokens
        return result

    def less(self, centre: Tensor) -> ChannelRanges:
        """The statistics of what channels differ from ``centre`` ``[channels]`` float32 by."""
        result = ChannelRanges(len(centre), self.lows.device)
        result.lows, result.highs = self.lows - centre, self.highs - centre
        result.firsts, result.rows = self.firsts - centre, self.rows - centre
        result.tokens = self.tokens
        return result

    def of_clusters(self, labels: Tensor, over: Over = "all") -> tuple[Tensor, Tensor]:
        """Lower and upper end of the range of each cluster of channels.

        Args:
            labels: ``[channels]`` int64, the cluster of each channel, from 0.
            over: how samples are combined. ``"all"``: the range of everything seen. ``"mean"``: the
                mean of the samples' ends. ``"running"``: an average in which each new sample weighs
                `NEWEST`, as in RPTQ's published code.

        Returns:
            ``(low, high)``, ``[clusters]`` float32 each.
        """
        shape = (len(self.lows), int(labels.max()) + 1)
        places = labels.expand(len(self.lows), -1)
        low = self.lows.new_empty(shape).scatter_reduce(
            1, places, self.lows, "amin", include_self=False
        )
        high = self.lows.new_empty(shape).scatter_reduce(
            1, places, self.highs, "amax", include_self=False
        )
        if over == "all":
            return low.amin(0), high.amax(0)
        if over == "mean":
            return low.mean(0), high.mean(0)
        return _running(low), _running(high)

    def surprises(self) -> tuple[Tensor, Tensor]:
        """How far each sample goes below and above all other samples, channel by channel.

        This tells how far other text will exceed a range that calibration found.

        Returns:
            ``(below, above)``, ``[samples, channels]`` float32 each, not negative; zeros for a
            single sample.
        """
        return _lead(-self.lows), _lead(self.highs)


def _lead(samples: Tensor) -> Tensor:
    """By how much each value of ``[samples, n]`` exceeds the others of its column; else zero."""
    lead = torch.zeros_like(samples)
    if len(samples) > 1:
        (first, second), (where, _) = samples.topk(2, dim=0)
        lead.scatter_(0, where.unsqueeze(0), (first - second).unsqueeze(0))
    return lead


def _running(samples: Tensor) -> Tensor:
    """The running average over the samples of ``[samples, n]``, starting at the first: ``[n]``."""
    average = samples[0].clone()
    for sample in samples[1:]:
        average.lerp_(sample, NEWEST)
    return average
