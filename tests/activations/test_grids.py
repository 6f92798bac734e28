"""Grids of activations fit values of any size."""

from __future__ import annotations

import pytest
import torch

from quantine.activations.grids import LABELS, StaticGrid, TokenGrid
from quantine.core.fit_range import (
    fit_activations,
    fit_activations_around_zero,
    fit_activations_as_published,
)
from quantine.core.spec import QuantSpec
from quantine.kernels import integer
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.matrix import packed_matrix
from quantine.methods.rtn import RTN
from samples import correlated_inputs, random_weight

X = correlated_inputs(24, 40)
POWERS = (-80, -40, -30, -16, 8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", POWERS)
def test_tokens_of_any_size_are_rounded_alike(bits: int, power: int) -> None:
    grid = TokenGrid(bits)
    assert torch.equal(grid(X * 2.0**power), grid(X) * 2.0**power)


@pytest.mark.parametrize(
    "fit", [fit_activations, fit_activations_around_zero, fit_activations_as_published]
)
@pytest.mark.parametrize("power", POWERS)
def test_clusters_of_any_size_are_rounded_alike(fit: object, power: int) -> None:
    assert callable(fit)
    labels = (torch.arange(24) % 3).to(LABELS)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        low = torch.stack([x[:, labels == cluster].min() for cluster in range(3)])
        high = torch.stack([x[:, labels == cluster].max() for cluster in range(3)])
        found: torch.Tensor = StaticGrid(4, *fit(low, high, 4), labels)(x)
        return found

    assert torch.equal(rounded(X * 2.0**power), rounded(X) * 2.0**power)


@pytest.mark.parametrize("power", POWERS)
def test_native_products_round_tokens_of_any_size_alike(power: int) -> None:
    qtensor = RTN()(random_weight(32, 24), None, QuantSpec(4, 8))
    matrix, native = packed_matrix(qtensor), integer.native_grid(InputGrid(8))
    if matrix is None or native is None:
        pytest.skip("needs the native extension")
    expected = integer.multiply(matrix, native, X) * 2.0**power
    found = integer.multiply(matrix, native, (X * 2.0**power).contiguous())
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 5.0, -3e-20, 7e12])
def test_a_channel_of_one_value_keeps_it(value: float) -> None:
    x = torch.full((2, 3), value)
    for scale, zero in (
        fit_activations(x[0], x[1], 8),
        fit_activations_as_published(x[0], x[1], 8),
    ):
        assert bool((scale > 0).all())
        rounded = StaticGrid(8, scale, zero, torch.arange(3, dtype=LABELS))(x)
        assert torch.allclose(rounded, x, rtol=1e-4)
