"""Input statistics and the factor of their inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import oracles
from quantine.core.permute import input_order
from quantine.errors import SolverError
from quantine.kernels.gram import add_gram
from quantine.statistics.hessian import Hessian
from quantine.statistics.inverse_factor import factorize
from samples import correlated_inputs, observed, random_weight

STRAIGHT, REVERSED = torch.arange(8), torch.arange(8).flip(0)


def test_hessian_is_the_sum_of_outer_products() -> None:
    hessian = observed(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    assert hessian.matrix.tolist() == [[10.0, -1.0], [-1.0, 5.0]]
    assert hessian.tokens == 2


def test_leading_dimensions_are_tokens() -> None:
    x = correlated_inputs(6, 24)
    batched = Hessian(6, add_gram)
    batched.update(x.view(2, 3, 4, 6))
    assert batched.tokens == 24
    torch.testing.assert_close(batched.matrix, observed(x).matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((4001, 1), 5.0, dtype=dtype)
    assert observed(x).matrix.item() == 100_025.0  # neither half format can hold this


def test_merge_equals_seeing_everything() -> None:
    x = correlated_inputs(8, 40)
    merged, rest = observed(x[:15]), observed(x[15:])
    merged.merge(rest)
    assert merged.tokens == 40
    torch.testing.assert_close(merged.matrix, observed(x).matrix)


def test_error_energy_is_the_squared_change_of_the_output() -> None:
    x, delta = correlated_inputs(12, 30), random_weight(5, 12)
    expected = float((x.double() @ delta.double().T).square().sum())
    assert observed(x).error_energy(delta) == pytest.approx(expected, rel=1e-5)
    assert oracles.output_error(delta.numpy(), observed(x).matrix.numpy()) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_gives_the_inverse_of_the_damped_hessian(act_order: bool) -> None:
    hessian = observed(correlated_inputs(24, 200)).matrix
    factor = factorize(hessian, 0.05, input_order(hessian.diagonal(), act_order))
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    damped = oracles.damped(hessian.numpy(), 0.05)[np.ix_(factor.order, factor.order)]
    mean = float(hessian.diagonal().double().mean())
    # The factor is that of H in units of its mean diagonal: only ratios of it are ever used.
    inverse = (upper.T @ upper).numpy() / mean
    np.testing.assert_allclose(inverse @ damped, np.eye(24), atol=2e-4)
    assert factor.damp == 0.05


def test_dead_inputs_get_the_mean_diagonal_and_no_feedback() -> None:
    x = correlated_inputs(6, 50)
    x[:, 2] = 0
    factor = factorize(observed(x).matrix, 0.01, torch.arange(6))
    row, column = factor.upper[2].clone(), factor.upper[:, 2].clone()
    assert row[2].item() == pytest.approx(1 / math.sqrt(1.01), rel=1e-5)
    row[2] = column[2] = 0
    assert not row.any()
    assert not column.any()


def test_an_all_zero_hessian_rounds_to_nearest() -> None:
    factor = factorize(torch.zeros(4, 4), 0.01, torch.arange(4))
    assert torch.equal(factor.upper, torch.diag(factor.upper.diagonal()))


def test_damping_grows_until_a_singular_hessian_factors() -> None:
    hessian = observed(correlated_inputs(32, 3))  # rank 3 of 32
    factor = hessian.factor(1e-9, torch.arange(32))
    assert 1e-9 < factor.damp < 1e-2  # the first step that suffices, not the last one
    assert hessian.damp_used == factor.damp
    assert bool(torch.isfinite(factor.upper).all())
    tenfold = math.log10(factor.damp / 1e-9)
    assert tenfold == pytest.approx(round(tenfold), abs=1e-6)


def test_damping_that_suffices_is_kept() -> None:
    hessian = observed(correlated_inputs(32, 400))
    assert hessian.damp_used is None
    hessian.factor(0.01, torch.arange(32))
    assert hessian.damp_used == 0.01


def test_no_damping_helps_an_indefinite_matrix() -> None:
    with pytest.raises(SolverError, match=r"damping 1: use more samples"):
        factorize(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01, torch.arange(2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    hessian = torch.eye(3)
    hessian[1, 2] = value
    with pytest.raises(SolverError, match="not finite"):
        factorize(hessian, 0.01, torch.arange(3))


def test_the_factor_is_shared_until_something_changes() -> None:
    hessian = observed(correlated_inputs(8, 60))
    first = hessian.factor(0.01, STRAIGHT)
    assert hessian.factor(0.01, STRAIGHT) is first
    assert hessian.factor(0.02, STRAIGHT).damp == 0.02
    assert hessian.factor(0.02, REVERSED).order.tolist() == REVERSED.tolist()
    hessian.update(correlated_inputs(8, 60, seed=1))
    assert hessian.damp_used is None
    refreshed = hessian.factor(0.02, REVERSED)
    expected = factorize(hessian.matrix, 0.02, REVERSED)
    assert torch.equal(refreshed.upper, expected.upper)
    hessian.merge(observed(correlated_inputs(8, 60, seed=2)))
    assert hessian.damp_used is None


@pytest.mark.parametrize("size", [5, 300, 641])
def test_the_diagonal_alone_is_that_of_the_factor_to_the_bit(size: int) -> None:
    hessian = observed(correlated_inputs(size, 2 * size))
    order = input_order(hessian.matrix.diagonal(), True, None)
    spread = hessian.spread(0.01, order)
    assert torch.equal(spread, factorize(hessian.matrix, 0.01, order).upper.diagonal())
    assert hessian.spread(0.01, order) is spread
    hessian.update(correlated_inputs(size, 60, seed=1))
    assert not torch.equal(hessian.spread(0.01, order), spread)


def test_factorizing_leaves_the_hessian_alone() -> None:
    hessian = observed(correlated_inputs(8, 60))
    before = hessian.matrix.clone()
    hessian.factor(0.01, STRAIGHT)
    assert torch.equal(hessian.matrix, before)
