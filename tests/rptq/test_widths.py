"""Bits of the channels of keys: as many as even ones, and never a larger expected error."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine.core.grid import decode
from quantine.kernels.kv_attention.state_grid import StateGrid
from quantine.rptq.ranges import cheapest_ranges_and_costs
from quantine.rptq.widths import WIDTHS, mixed_grid, shared_out
from quantine.statistics.channel_ranges import ChannelRanges


@given(st.integers(1, 4), st.integers(0, 9), st.integers(0, 99))
def test_digits_go_where_they_take_most_away(clusters: int, digits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The error falls with every digit, and by less each time, as that of a grid does.
    falls = torch.rand(4, clusters, generator=generator).sort(0, descending=True)[0]
    costs = torch.cat([falls.sum(0, keepdim=True), falls.sum(0) - falls.cumsum(0)])
    chosen = shared_out(costs, torch.ones(clusters, dtype=torch.int64), digits)
    assert int(chosen.sum()) == min(digits, 4 * clusters)
    found = float(costs.gather(0, chosen[None]).sum())
    every = [each for each in product(range(5), repeat=clusters) if sum(each) <= digits]
    least = min(sum(float(costs[n, c]) for c, n in enumerate(each)) for each in every)
    assert found <= least + 1e-5


def test_digits_that_help_only_together_are_given_together() -> None:
    costs = torch.tensor([[1.0, 0.3], [1.0, 0.1], [0.0, 0.1]])
    assert shared_out(costs, torch.tensor([1, 1]), 2).tolist() == [2, 0]
    assert shared_out(costs, torch.tensor([3, 1]), 5).tolist() == [0, 1]


def seen_of(x: torch.Tensor) -> ChannelRanges:
    seen = ChannelRanges(x.shape[-1])
    seen.update(x, len(x))
    return seen


@given(st.integers(2, 7), st.integers(1, 2), st.integers(0, 20))
def test_mixed_grids_cost_no_more_than_even_ones(bits: int, heads: int, seed: int) -> None:
    dim = 8
    generator = torch.Generator().manual_seed(seed)
    loud = torch.logspace(-1, 2, heads * dim)[torch.randperm(heads * dim, generator=generator)]
    x = torch.randn(8, 64, heads * dim, generator=generator) * loud + loud
    seen, labels = seen_of(x), torch.arange(heads * dim)
    importance = torch.rand(heads * dim, generator=generator)
    scale, zero, widths = mixed_grid(seen, importance, labels, bits, heads)
    by_head = widths.view(heads, dim).long().sum(1)
    assert set(widths.tolist()) <= set(WIDTHS)
    assert bool((by_head <= bits * dim).all())
    shape = (heads, dim)
    grid = StateGrid.uneven(bits, scale.view(shape), zero.view(shape), None, widths.view(shape))
    off = grid.rounded(x.view(-1, *shape)).view(x.shape) - x
    error = float((off.square().sum((0, 1)) * importance).sum())
    even_scale, even_zero, _ = cheapest_ranges_and_costs(seen, importance, labels, bits // 2 * 2)
    codes = torch.div(x, even_scale).add_(even_zero).round_().clamp_(0, 2 ** (bits // 2 * 2) - 1)
    even = float(
        ((decode(codes, even_scale, even_zero) - x).square().sum((0, 1)) * importance).sum()
    )
    assert error <= even * 1.05


def test_channels_that_do_not_count_keep_their_mean() -> None:
    x = torch.randn(4, 32, 4, generator=torch.Generator().manual_seed(0)) + 5
    importance = torch.tensor([1.0, 0.0, 1.0, 0.0])
    scale, zero, widths = mixed_grid(seen_of(x), importance, torch.arange(4), 2, 1)
    assert widths.tolist() == [4, 0, 4, 0]
    constant = decode(torch.zeros(4), scale, zero)
    torch.testing.assert_close(constant[[1, 3]], seen_of(x).rows.mean(0)[[1, 3]])


def test_a_loud_first_token_asks_for_bits() -> None:
    x = torch.randn(8, 64, 4, generator=torch.Generator().manual_seed(0))
    x[..., 0] *= 0.01
    x[:, 0, 0] = 50
    _, _, widths = mixed_grid(seen_of(x), torch.ones(4), torch.arange(4), 3, 1)
    assert int(widths[0]) > 0
