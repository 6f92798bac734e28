"""Ranges of activations, and the grids over them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.core.fit_range import fit_activations, fit_activations_as_published
from quantine.kernels.kv_attention.reference import round_probabilities
from quantine.rptq.ranges import cheapest_ranges, through, widened
from quantine.statistics.channel_ranges import ChannelRanges, Over


def samples(count: int, tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 2, channels)
    return torch.randn(count, tokens, channels, generator=generator) * scales + scales / 3


@pytest.mark.parametrize("over", get_args(Over))
def test_ranges_of_clusters_are_those_of_the_textbook(over: Over) -> None:
    x, labels = samples(9, 7, 6), torch.tensor([0, 1, 0, 2, 1, 1])
    seen = ChannelRanges(6)
    seen.update(x[:4], 4)
    seen.update(x[4:].flatten(0, 1), 5)  # as the MLP of some models flattens them
    low, high = seen.of_clusters(labels, over)
    expected = oracles.cluster_ranges(x.double().numpy(), labels.tolist(), over)
    assert low.tolist() == pytest.approx([one[0] for one in expected], rel=1e-5)
    assert high.tolist() == pytest.approx([one[1] for one in expected], rel=1e-5)


def test_what_was_seen_can_be_put_in_another_order() -> None:
    x, order = samples(6, 5, 4), torch.tensor([2, 0, 3, 1])
    ordered, expected = shown(x).ordered(order), shown(x[:, :, order])
    for name in ("lows", "highs", "firsts", "rows"):
        assert torch.equal(getattr(ordered, name), getattr(expected, name)), name


@given(st.floats(-50, 50), st.floats(0, 100))
def test_a_margin_lies_beyond_both_ends_unless_one_is_zero(low: float, width: float) -> None:
    ends = torch.tensor([low]), torch.tensor([low]) + torch.tensor([width])
    wide = widened(*ends)
    assert bool((wide[0] <= ends[0]).all())
    assert bool((wide[1] >= ends[1]).all())
    slack = (abs(low) + width) * 1e-5 + 1e-30
    if low <= 0 <= float(ends[1]):
        assert wide[0].item() == pytest.approx(1.25 * low, abs=slack)
        assert wide[1].item() == pytest.approx(1.25 * ends[1].item(), abs=slack)
    else:
        assert (wide[1] - wide[0]).item() == pytest.approx(1.25 * width, abs=slack)


@given(st.integers(2, 8), st.integers(0, 50))
def test_grids_through_values_have_them_without_error(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(5, generator=generator) * 10
    high = low + torch.rand(5, generator=generator) * 20 + 0.1
    values = low + (high - low) * torch.rand(5, generator=generator)
    scale, whole = fit_activations(low, high, bits)
    own = torch.arange(5)
    zero = through(values, scale, whole, own)
    assert bool(((zero - whole).abs() <= 0.5001).all())
    inside = ((values / scale + zero).round() - (2**bits - 1) / 2).abs() <= (2**bits - 1) / 2
    errors = (StaticGrid(bits, scale, zero, own.int())(values) - values).abs()
    slack = 1e-5 * (values.abs() + scale * zero.abs()) + 1e-6
    assert bool((errors <= slack)[inside].all())
    assert bool((errors <= scale)[~inside].all())
    shared = through(values, scale[:1], whole[:1], torch.zeros_like(own))
    steps = values.mean() / scale[0] + shared[0]
    assert steps.item() == pytest.approx(round(steps.item()), abs=1e-3)


@given(st.integers(2, 8), st.floats(-50, 50), st.floats(0, 100))
def test_covering_grids_reach_both_ends_within_half_a_step(
    bits: int, low: float, width: float
) -> None:
    ends = torch.tensor([low]), torch.tensor([low]) + torch.tensor([width])
    scale, zero = fit_activations(*ends, bits)
    grid = StaticGrid(bits, scale, zero, torch.zeros(2, dtype=torch.int32))
    values = torch.cat(ends).unsqueeze(0)
    slack = float(scale[0]) * 0.51 + abs(low) * 1e-5 + 1e-6
    assert float((grid(values) - values).abs().max()) <= slack


@given(st.integers(2, 8), st.integers(0, 20))
def test_faithful_grids_are_those_of_the_published_formula(bits: int, seed: int) -> None:
    x = samples(1, 20, 5, seed)[0]
    labels = torch.tensor([0, 0, 1, 2, 2])
    seen = ChannelRanges(5)
    seen.update(x, 1)
    low, high = seen.of_clusters(labels, "running")
    grid = StaticGrid(bits, *fit_activations_as_published(low, high, bits), labels.int())
    rounded = grid(x)
    for row, values in zip(x.tolist(), rounded.tolist(), strict=True):
        for channel, (value, found) in enumerate(zip(row, values, strict=True)):
            ends = float(low[labels[channel]]), float(high[labels[channel]])
            expected = oracles.published_activation(value, *ends, bits)
            step = max((ends[1] - ends[0]) / 2**bits, 1e-4)
            # A value between two codes may go either way in float32.
            assert (
                abs(found - expected) <= step * 1e-3
                or abs(abs(found - expected) - step) < step * 1e-3
            )


def shown(x: torch.Tensor) -> ChannelRanges:
    """What ``[samples, tokens, channels]`` shows."""
    seen = ChannelRanges(x.shape[-1])
    seen.update(x, len(x))
    return seen


def test_what_a_sample_alone_showed_is_told_from_what_others_did_too() -> None:
    x = samples(5, 4, 3)
    below, above = shown(x).surprises()
    for sample in range(5):
        others = torch.cat([x[:sample], x[sample + 1 :]]).flatten(0, 1)
        expected = (x[sample].amax(0) - others.amax(0)).clamp(min=0)
        assert torch.equal(above[sample], expected)
        expected = (others.amin(0) - x[sample].amin(0)).clamp(min=0)
        assert torch.equal(below[sample], expected)
    assert not torch.stack(shown(x[:1]).surprises()).any()


def test_samples_can_be_left_out_afterwards() -> None:
    x = samples(6, 40, 4)
    left, expected = shown(x).after(2), shown(x[2:])
    assert torch.equal(left.lows, expected.lows)
    assert torch.equal(left.highs, expected.highs)
    assert torch.equal(left.firsts, expected.firsts)
    assert torch.equal(left.rows, expected.rows)
    assert left.tokens == expected.tokens == 160


@given(st.integers(2, 5), st.integers(0, 10))
def test_searched_ranges_never_cost_more_than_the_whole_range(bits: int, seed: int) -> None:
    x, labels = samples(1, 16, 6, seed), torch.tensor([0, 1, 1, 0, 2, 2])
    importance = torch.rand(6, generator=torch.Generator().manual_seed(seed)) + 0.1
    seen = shown(x)  # every token is kept

    def cost(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        rounded = StaticGrid(bits, scale, zero, labels.int())(x[0])
        return torch.zeros(3).index_add_(0, labels, (rounded - x[0]).square().sum(0) * importance)

    found = cost(*cheapest_ranges(seen, importance, labels, bits))
    assert bool((found <= cost(*fit_activations(*seen.of_clusters(labels), bits)) * 1.00001).all())


def test_a_few_loud_values_are_clipped_where_that_is_cheaper() -> None:
    x = torch.randn(20, 100, 1, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 8.0
    one = torch.zeros(1, dtype=torch.int64)
    scale, _ = cheapest_ranges(shown(x), torch.ones(1), one, 4)
    assert float(scale[0]) * 15 < 9.5


def test_a_value_that_every_sample_has_is_not_clipped() -> None:
    x = torch.randn(20, 100, 1, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 80.0  # not among the tokens that are kept
    one = torch.zeros(1, dtype=torch.int64)
    scale, zero = cheapest_ranges(shown(x), torch.ones(1), one, 4)
    assert float(scale[0] * (15 - zero[0])) > 60


def test_ranges_go_beyond_what_was_seen_where_samples_differ_and_steps_are_small() -> None:
    heavy = torch.distributions.StudentT(2.0)
    torch.manual_seed(0)
    x = heavy.sample(torch.Size([16, 200, 64]))
    own = torch.arange(64)
    seen = shown(x)
    whole = fit_activations(*seen.of_clusters(own), 8)
    searched = cheapest_ranges(seen, torch.ones(64), own, 8)
    assert float((searched[0] / whole[0]).mean()) > 1.1
    new = heavy.sample(torch.Size([16, 200, 64])).flatten(0, 1)

    def lost(scale: torch.Tensor, zero: torch.Tensor) -> float:
        return float((StaticGrid(8, scale, zero, own.int())(new) - new).square().mean())

    assert lost(*searched) < 0.9 * lost(*whole)


def test_each_token_has_its_own_range() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 100.0, 200.0, 300.0]])
    assert torch.allclose(TokenGrid(2)(x), x)


def test_probabilities_reach_zero_and_one() -> None:
    p = torch.tensor([0.0, 0.0019, 0.5, 1.0])
    rounded = round_probabilities(p, 8, relative=False)
    assert rounded.mul(255).tolist() == pytest.approx([0, 0, 128, 255])


def test_grids_survive_casts() -> None:
    grid = StaticGrid(4, torch.tensor([1e-3]), torch.tensor([-500.0]), torch.zeros(2).int())
    before = grid.get_buffer("scale").clone()
    grid.to(torch.bfloat16)
    assert torch.equal(grid.get_buffer("scale"), before)
    x = torch.tensor([[0.5, 0.501]], dtype=torch.bfloat16)
    assert grid(x).dtype == torch.bfloat16
    assert np.isfinite(grid(x).float().numpy()).all()
