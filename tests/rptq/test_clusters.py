"""Clusters of channels: partitions, their orders, and heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine.core.permute import order_within_heads
from quantine.rptq.clusters import Clusters, cluster_channels


def points(channels: int, seed: int) -> torch.Tensor:
    return torch.randn(channels, 2, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 9), st.sampled_from([1, 2, 3]))
def test_clusters_partition_the_channels_of_each_head(
    width: int, count: int, seed: int, heads: int
) -> None:
    found = cluster_channels(points(width * heads, seed), count, heads)
    assert sum(found.sizes) == width * heads
    assert min(found.sizes) > 0
    of_heads = [set(labels.tolist()) for labels in found.labels.chunk(heads)]
    assert sum(map(len, of_heads)) == len(set().union(*of_heads)) == len(found.sizes)
    assert all(len(one) == min(count, width) for one in of_heads)
    assert sorted(found.order.tolist()) == list(range(width * heads))
    ordered = found.ordered().labels
    assert bool((ordered.diff() >= 0).all())
    assert torch.equal(found.order[: found.sizes[0]], (found.labels == 0).nonzero()[:, 0])


def test_separate_groups_of_points_are_found() -> None:
    loud = torch.tensor([True, False, False, True, False])
    values = torch.where(loud, 100.0, 1.0)
    found = cluster_channels(torch.stack([values, -values], 1) + points(5, 0) * 0.1, 2)
    assert len(set(found.labels[loud].tolist())) == 1
    assert len(set(found.labels[~loud].tolist())) == 1


def test_equal_points_share_a_cluster() -> None:
    found = cluster_channels(torch.zeros(7, 2), 4)
    assert found.sizes == (7,)


def test_the_same_points_give_the_same_clusters() -> None:
    first, second = (cluster_channels(points(50, 3), 5) for _ in range(2))
    assert torch.equal(first.labels, second.labels)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]), st.integers(1, 5))
def test_copies_of_heads_have_the_order_of_their_head_and_clusters_of_their_own(
    heads: int, copies: int, width: int
) -> None:
    found = cluster_channels(points(heads * width, 1), 2, heads)
    order = order_within_heads(found.order, heads, copies)
    wide = found.shared(heads, copies)
    assert sorted(order.tolist()) == list(range(heads * copies * width))
    assert torch.equal(wide.ordered().labels, wide.labels[order])
    for head in range(heads * copies):
        own = order[head * width : (head + 1) * width] - head * width
        of_head = found.order[head // copies * width :][:width] - head // copies * width
        assert torch.equal(own, of_head)
    assert len(wide.sizes) == len(found.sizes) * copies


def test_sizes_count_labels() -> None:
    assert Clusters(torch.tensor([1, 0, 1, 1])).sizes == (1, 3)
    assert Clusters(torch.tensor([1, 0, 1, 1])).order.tolist() == [1, 0, 2, 3]


def test_orders_of_one_head_are_themselves() -> None:
    order = torch.tensor([2, 0, 1])
    assert torch.equal(order_within_heads(order, 1, 1), order)
    with pytest.raises(RuntimeError):
        order_within_heads(order, 2, 1)
