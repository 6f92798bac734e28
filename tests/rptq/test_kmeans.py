"""KMeans: as good as scikit-learn's, whole clusters, and hard points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.rptq.kmeans import kmeans


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(points: Tensor, labels: Tensor) -> float:
    """The sum of squared distances of points from the mean of their cluster."""
    points = points.double()
    chosen = torch.nn.functional.one_hot(labels).double()
    means = (chosen.T @ points) / chosen.sum(0).clamp(min=1).unsqueeze(1)
    return (points - means[labels]).square().sum().item()


def ranges(kind: str, channels: int, seed: int) -> Tensor:
    """Largest and smallest values of channels: alike, of many sizes, or with loud ones."""
    x = torch.randn(channels, 2, generator=generator(seed), dtype=torch.float64)
    if kind == "many sizes":
        return x * torch.randn(channels, 1, generator=generator(seed + 1)).double().exp()
    if kind == "loud":
        x = torch.stack([x[:, 0].abs(), -x[:, 1].abs()], 1)
        x[::97] *= 50
    return x


@pytest.mark.parametrize(
    ("channels", "count"), [(64, 4), (576, 32), (768, 8), (2048, 16), (4096, 32)]
)
def test_errors_are_no_greater_than_those_of_scikit_learn(channels: int, count: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    ratios = []
    for kind in ("alike", "many sizes", "loud"):
        for seed in range(2):
            points = ranges(kind, channels, seed)
            other = cluster.KMeans(count, n_init=10, random_state=0).fit(points.numpy())
            found = error(points, kmeans(points.unsqueeze(0), count)[0])
            ratios.append(found / other.inertia_)
    assert sum(ratios) / len(ratios) < 1.0
    assert max(ratios) < 1.03


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.integers(0, 9))
def test_every_cluster_has_points_and_points_are_in_the_nearest(
    n: int, count: int, features: int, seed: int
) -> None:
    points = torch.randn(2, n, features, generator=generator(seed))
    for own, labels in zip(points, kmeans(points, count), strict=True):
        assert sorted(set(labels.tolist())) == list(range(min(n, count)))
        chosen = torch.nn.functional.one_hot(labels).float()
        means = (chosen.T @ own) / chosen.sum(0).unsqueeze(1)
        away = (own.unsqueeze(1) - means).square().sum(2)
        least = away.amin(1)
        assert torch.allclose(away.gather(1, labels.unsqueeze(1))[:, 0], least, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_differing_points_that_are_as_few_as_clusters_are_told_apart(scale: float) -> None:
    few = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1000.0, -5.0], [1000.0, -5.01]])
    points = (few * scale)[torch.randint(5, (200,), generator=generator(0))]
    labels = kmeans(points.unsqueeze(0), 5)[0]
    assert len(torch.column_stack([points, labels]).unique(dim=0)) == 5
    assert len(labels.unique()) == 5
    more = kmeans(points.unsqueeze(0), 9)[0]
    assert len(torch.column_stack([points, more]).unique(dim=0)) == 5


def test_small_differences_beside_a_large_offset_count() -> None:
    step = torch.tensor([0.0, 1e-5]).repeat(50)
    labels = kmeans(torch.stack([2 + step, 3 - step], 1).unsqueeze(0), 2)[0]
    assert torch.equal(labels == labels[0], step == 0)


def test_problems_do_not_share_clusters() -> None:
    one, other = ranges("alike", 50, 1), ranges("loud", 50, 2)
    both = kmeans(torch.stack([one, other]), 4)
    for points, labels in zip((one, other), both, strict=True):
        alone = kmeans(points.unsqueeze(0), 4)[0]
        assert error(points, labels) < 1.1 * error(points, alone)


def test_the_random_state_of_callers_neither_counts_nor_changes() -> None:
    points = ranges("alike", 100, 3).unsqueeze(0)
    torch.manual_seed(1)
    first, state = kmeans(points, 7), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, kmeans(points, 7))
