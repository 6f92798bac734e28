"""Factors of tokens, and grids that tokens meet after them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine.activations.grids import StaticGrid
from quantine.core.fit_range import fit_activations_around_zero
from quantine.kernels.integer.token_factors import LARGEST, SMALLEST, factors, steepness


def grid(bits: int, seed: int, reach: float | None = 1.0) -> StaticGrid:
    """Three clusters of eight channels, one of them of values that are never negative."""
    g = torch.Generator().manual_seed(seed)
    low, high = -torch.rand(3, generator=g) * 9 - 0.1, torch.rand(3, generator=g) * 9 + 0.1
    low[1] = 0.5  # above zero: the grid begins at zero all the same
    scale, zero = fit_activations_around_zero(low, torch.maximum(high, low + 1), bits)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    return StaticGrid(
        bits, scale, zero, labels.int(), reach=None if reach is None else torch.tensor([reach])
    )


def tokens(seed: int, count: int = 7) -> torch.Tensor:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * 3
    x[:, [1, 4]] = x[:, [1, 4]].abs()
    return x


@given(st.integers(2, 8), st.integers(0, 99))
def test_the_largest_value_lies_on_an_end_and_all_others_within(bits: int, seed: int) -> None:
    own, x = grid(bits, seed), tokens(seed)
    scale, zero = own.of_channels()
    factor = factors(x, *steepness(scale, zero, bits, torch.ones(1)))
    high, low = (2**bits - 1 - zero) * scale, -zero * scale
    ends = torch.where(x > 0, high, low)
    kept = ends != 0  # a grid may have no code on one side of zero
    shares = torch.where(kept, x / ends / factor, 0.0)
    beyond = factor.flatten() == LARGEST
    assert torch.allclose(shares.amax(1)[~beyond], torch.ones(1))
    assert bool((shares.amax(1)[beyond] >= 1).all())
    steps = factor * scale / 2
    errors = (own(x) - x).abs() - steps * 1.001 - 1e-6
    assert bool((errors <= 0)[kept & ~beyond.unsqueeze(1)].all())
    assert not own(x)[~kept].any()


@given(st.integers(2, 8), st.integers(0, 99), st.floats(1e-9, 1e-3))
def test_how_loud_a_token_is_does_not_matter(bits: int, seed: int, loud: float) -> None:
    own, x = grid(bits, seed, 0.8), tokens(seed)
    # A power of two changes no digit.
    power = 2.0 ** round(torch.tensor(loud).log2().item())
    x = x / 1024
    assert torch.equal(own(x * power), own(x) * power)
    still = grid(bits, seed, None)
    assert not torch.allclose(still(x * 1024.0), still(x) * 1024.0)


def test_a_channel_that_never_was_active_does_not_take_the_steps_of_others() -> None:
    scale, zero = fit_activations_around_zero(torch.zeros(2), torch.tensor([10.0, 0.0]), 8)
    labels = torch.tensor([0, 0, 0, 1]).int()
    own = StaticGrid(8, scale, zero, labels, reach=torch.ones(1))
    x = torch.tensor([[1.0, 4.0, 9.0, 0.05]])
    assert own(x)[0, :3].tolist() == pytest.approx([1.0, 4.0, 9.0], abs=10 * LARGEST / 255 * 0.51)


def test_infinite_values_are_clipped() -> None:
    own = grid(8, 0)
    x = tokens(0, 1)
    x[0, 2] = -torch.inf
    found = own(x)
    assert bool(found.isfinite().all())
    assert found[0, 2] < -1


def test_quiet_tokens_have_small_steps() -> None:
    x = tokens(0) / 1000
    assert (grid(8, 0)(x) - x).abs().max() < 0.01 * (grid(8, 0, None)(x) - x).abs().max()


@pytest.mark.parametrize("reach", [1.0, 0.7])
def test_what_lies_beyond_the_reach_is_clipped(reach: float) -> None:
    own = StaticGrid(8, torch.tensor([1.0]), torch.tensor([0.0]), torch.zeros(3).int())
    own.refit(own.get_buffer("scale"), own.get_buffer("zero"), None, torch.tensor([reach]))
    found = own(torch.tensor([[1.0, 0.5, 0.0]]))
    assert found[0].tolist() == pytest.approx([reach, 0.5, 0.0], abs=2e-3)


def test_a_token_of_zeros_stays_one() -> None:
    assert not grid(4, 0)(torch.zeros(2, 8)).any()
    scale, zero = grid(4, 0).of_channels()
    assert factors(torch.zeros(2, 8), *steepness(scale, zero, 4, torch.ones(1))).eq(SMALLEST).all()


def test_the_reach_keeps_its_dtype_and_is_stored() -> None:
    own = grid(4, 0, 0.85).to(torch.bfloat16)
    assert own.get_buffer("reach").dtype == torch.float32
    assert set(own.state_dict()) == {"scale", "zero", "labels", "reach"}
    assert own.reached() == torch.tensor([0.85])
