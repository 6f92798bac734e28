"""Channels of alike ranges: the clusters of RPTQ (arXiv 2304.01089, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor

from quantine.errors import PlanError

RESTARTS: Final = 10
"""Runs of KMeans from other starting points, of which the best counts."""
SEED: Final = 0


@dataclass(frozen=True)
class Clusters:
    """A partition of channels.

    Attributes:
        labels: ``[channels]`` int64: the cluster of each channel, from 0, none empty.
    """

    labels: Tensor

    @property
    def order(self) -> Tensor:
        """``[channels]`` int64: place ``j`` gets channel ``order[j]``; clusters as they were."""
        order: Tensor = self.labels.argsort(stable=True)
        return order

    @property
    def sizes(self) -> tuple[int, ...]:
        """Channels in each cluster."""
        return tuple(self.labels.bincount().tolist())

    def ordered(self) -> Clusters:
        """The clusters of the channels once these are in `order`."""
        return Clusters(self.labels[self.order])

    def shared(self, heads: int, copies: int) -> Clusters:
        """The same partition for channels of which each head has ``copies`` in a row.

        Args:
            heads: heads that `labels` consist of, of the same number of channels each, none of
                which shares a cluster with another.
            copies: heads that take the place of each; every one gets clusters of its own.
        """
        copied = self.labels.view(heads, -1).repeat_interleave(copies, 0)
        starts = copied.amin(1, keepdim=True)
        counts = copied.amax(1, keepdim=True) - starts + 1
        return Clusters((copied - starts + counts.cumsum(0) - counts).flatten())


def check_installed() -> None:
    """Refuse clusters where nothing can make them.

    Raises:
        PlanError: scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise PlanError(
            "clusters of channels need scikit-learn: pip install 'quantine[activations]'"
        )


def cluster_channels(points: Tensor, count: int, heads: int = 1) -> Clusters:
    """Partition channels by KMeans.

    Args:
        points: ``[channels, features]`` float: what is alike in a cluster, such as the largest and
            the smallest value of each channel.
        count: clusters; fewer where fewer points differ.
        heads: runs of channels that are partitioned each by itself, ``count`` clusters in each.

    Raises:
        PlanError: scikit-learn is not installed.
    """
    found: list[Tensor] = []
    used = 0
    for own in points.detach().double().chunk(heads):
        labels = _kmeans(own, count) + used
        used = int(labels.max()) + 1
        found.append(labels)
    return Clusters(torch.cat(found))


def _kmeans(points: Tensor, count: int) -> Tensor:
    """Labels ``[points]`` int64 from 0, none of them unused."""
    distinct, same = torch.unique(points, dim=0, return_inverse=True)
    if len(distinct) <= count:
        known: Tensor = same
        return known
    check_installed()
    from sklearn.cluster import KMeans

    solved = KMeans(count, n_init=RESTARTS, random_state=SEED).fit(points.cpu().numpy())
    labels = torch.from_numpy(solved.labels_).long().to(points.device)
    used: Tensor = torch.unique(labels, return_inverse=True)[1]
    return used
