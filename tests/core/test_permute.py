"""Orders of inputs."""

from __future__ import annotations

import pytest
import torch

from quantine.core.permute import input_order, inverse, is_order

STRENGTH = torch.tensor([1.0, 4.0, 1.0, 9.0, 7.0, 8.0])


def test_the_strongest_come_first_and_equals_keep_their_order() -> None:
    assert input_order(STRENGTH, act_order=True).tolist() == [3, 5, 4, 1, 0, 2]
    assert input_order(STRENGTH, act_order=False).tolist() == [0, 1, 2, 3, 4, 5]


def test_aligned_groups_stay_together_ordered_by_their_mean() -> None:
    # Means 2.5, 5, 7.5: the pair with the single strongest input is not the first.
    assert input_order(STRENGTH, True, 2).tolist() == [5, 4, 3, 2, 1, 0]
    # Groups of three: means 2 and 8; the strongest of each group first.
    assert input_order(STRENGTH, True, 3).tolist() == [3, 5, 4, 1, 0, 2]
    swapped = STRENGTH.flip(0)  # 8 7 9 | 1 4 1
    assert input_order(swapped, True, 3).tolist() == [2, 0, 1, 4, 3, 5]


@pytest.mark.parametrize("group_size", [None, 1, 4, 12])
def test_every_input_is_named_once(group_size: int | None) -> None:
    strength = torch.rand(12, generator=torch.Generator().manual_seed(0))
    order = input_order(strength, True, group_size)
    assert sorted(order.tolist()) == list(range(12))
    assert torch.equal(inverse(order)[order], torch.arange(12))
    assert torch.equal(order[inverse(order)], torch.arange(12))
    if group_size is not None:
        runs = order.view(-1, group_size) // group_size
        assert bool((runs == runs[:, :1]).all())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_only_permutations_are_orders(dtype: torch.dtype) -> None:
    for order in ([], [0], [2, 0, 1]):
        assert is_order(torch.tensor(order, dtype=dtype))
    for order in ([1], [-1], [0, 0], [0, 2], [0, 1, 2**15 - 1], [-1, 0, 1], [1, 2, 3]):
        assert not is_order(torch.tensor(order, dtype=dtype))
