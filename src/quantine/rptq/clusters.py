"""Clusters of channels with similar ranges (RPTQ, arXiv 2304.01089, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.rptq.kmeans import kmeans


@dataclass(frozen=True)
class Clusters:
    """A partition of channels into clusters.

    Attributes:
        labels: ``[channels]`` int64, the cluster of each channel, numbered from 0; none is empty.
    """

    labels: Tensor

    @property
    def order(self) -> Tensor:
        """The order that puts the channels of each cluster side by side.

        ``[channels]`` int64: place ``j`` gets channel ``order[j]``. Clusters come by number, and
        channels within a cluster stay in their order.
        """
        order: Tensor = self.labels.argsort(stable=True)
        return order

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of channels in each cluster."""
        return tuple(self.labels.bincount().tolist())

    def ordered(self) -> Clusters:
        """The same clusters, for channels that have been put in `order`."""
        return Clusters(self.labels[self.order])

    def shared(self, heads: int, copies: int) -> Clusters:
        """The clusters of queries' heads, where several share a head of keys and values.

        Args:
            heads: number of heads that `labels` consist of, each with as many channels; no cluster
                has channels of two of them.
            copies: number of heads that take the place of each, in a row. They have the same
                partition, but each gets clusters of its own.
        """
        copied = self.labels.view(heads, -1).repeat_interleave(copies, 0)
        starts = copied.amin(1, keepdim=True)
        counts = copied.amax(1, keepdim=True) - starts + 1
        return Clusters((copied - starts + counts.cumsum(0) - counts).flatten())


def cluster_channels(points: Tensor, count: int, heads: int = 1) -> Clusters:
    """Partition channels into clusters of similar points, by KMeans.

    Args:
        points: ``[channels, features]`` of any float dtype, finite, such as the largest and the
            smallest value of each channel.
        count: number of clusters; fewer result where fewer points differ.
        heads: number of equal runs of channels that are partitioned separately, each into ``count``
            clusters.
    """
    own = points.detach().view(heads, -1, points.shape[1])
    labels = kmeans(own, count) + count * torch.arange(heads, device=points.device).unsqueeze(1)
    used: Tensor = torch.unique(labels.flatten(), return_inverse=True)[1]
    return Clusters(used)
