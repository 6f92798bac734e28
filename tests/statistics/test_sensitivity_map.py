"""Sensitivity maps against the formula, one weight at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.permute import input_order
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.methods.gptq import GPTQ
from quantine.methods.spqr import SpQR
from quantine.statistics.hessian import Hessian
from quantine.statistics.sensitivity_map import cell_of, pool_mean, sensitivity_map
from samples import correlated_inputs, observed, quick, random_weight

SPEC = QuantSpec(3, 8)


def slow_map(weight: Tensor, qtensor: QTensor, hessian: Hessian, cells: int = 128) -> np.ndarray:
    """The formula of the paper with `numpy.linalg.inv`, in loops, as log10 of means over cells."""
    assert hessian.damp_used is not None
    mean = hessian.matrix.double().numpy() / hessian.tokens
    damped = mean + np.eye(len(mean)) * hessian.damp_used * np.diagonal(mean).mean()
    inverse = np.linalg.inv(damped)
    rows, columns = weight.shape
    scales, zeros = qtensor.grid.scales().numpy(), qtensor.grid.zeros().numpy()
    order = range(columns) if qtensor.in_perm is None else qtensor.in_perm.tolist()
    height, width = min(rows, cells), min(columns, cells)
    sums, counts = np.zeros((height, width)), np.zeros((height, width))
    for r in range(rows):
        for stored, j in enumerate(order):
            scale = float(scales[r, stored // qtensor.grid.group_size])
            zero = float(zeros[r, stored // qtensor.grid.group_size])
            w = float(weight[r, j])
            code = min(max(round(w / scale + zero), 0), 2**qtensor.grid.bits - 1)
            place = r * height // rows, j * width // columns
            sums[place] += (w - scale * (code - zero)) ** 2 / (2 * inverse[j, j])
            counts[place] += 1
    return np.log10(sums / counts)


SOLVERS = {
    "gptq, input order": GPTQ(groups="static"),
    "gptq, stored order": GPTQ(groups="refit"),
    "spqr with outliers": SpQR(threshold=0.3),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("shape", [(24, 16), (130, 64), (7, 136)])
def test_the_map_is_the_formula(solver: GPTQ | SpQR, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    weight[3, 5] = 1.0
    hessian = observed(correlated_inputs(shape[1], 400))
    solved = solver(weight, hessian, SPEC)
    inverse = hessian.inverse_diagonal()
    assert inverse is not None
    before = weight.clone()
    found = sensitivity_map(weight, solved, inverse)
    assert torch.equal(weight, before)
    assert found.dtype == torch.float16
    expected = slow_map(weight, solved, hessian)
    # float16 of a number near -6 has steps of 1/256.
    np.testing.assert_allclose(found.double().numpy(), expected, atol=4e-3)


def grid_of(weight: Tensor) -> QTensor:
    """``weight`` on one coarse grid."""
    grid = Grid(torch.full((len(weight), 1), 0.25).half(), None, 3, weight.shape[1])
    return QTensor(grid.encode(weight), grid)


def test_a_strong_input_is_the_brightest_column_and_a_badly_rounded_output_the_brightest_row() -> (
    None
):
    weight = torch.full((40, 48), 0.30)
    weight[11] = 0.375  # halfway between two codes
    inverse = torch.ones(48)
    inverse[7] = 1e-3
    found = sensitivity_map(weight, grid_of(weight), inverse).float()
    assert set(found.argmax(1).tolist()) == {7}
    assert set(found.argmax(0).tolist()) == {11}


def test_what_costs_nothing_is_minus_infinity() -> None:
    weight = torch.full((4, 6), 0.30)
    weight[2] = 0.5  # on the grid
    inverse = torch.ones(6)
    inverse[1] = math.inf
    found = sensitivity_map(weight, grid_of(weight), inverse)
    nothing = found == -math.inf
    assert bool(nothing[2].all())
    assert bool(nothing[:, 1].all())
    assert int(nothing.sum()) == 6 + 4 - 1


@quick
@given(st.integers(1, 700), st.integers(1, 130))
def test_cells_are_runs_of_about_equal_length(length: int, cells: int) -> None:
    found = cell_of(length, cells)
    assert found.tolist() == sorted(found.tolist())
    counts = found.bincount()
    assert len(counts) == min(length, cells)
    assert int(counts.max() - counts.min()) <= 1
    assert int(counts.min()) >= 1


def test_means_over_cells_that_differ_in_size() -> None:
    values = torch.arange(15.0).view(3, 5)
    pooled = pool_mean(values, cells=2)
    assert cell_of(3, 2).tolist() == [0, 0, 1]
    assert cell_of(5, 2).tolist() == [0, 0, 0, 1, 1]
    assert pooled.tolist() == [[(0 + 1 + 2 + 5 + 6 + 7) / 6, (3 + 4 + 8 + 9) / 4], [11, 13.5]]


@pytest.mark.parametrize("act_order", [False, True])
def test_the_inverse_diagonal_is_numpys(act_order: bool) -> None:
    hessian = observed(correlated_inputs(24, 200))
    assert hessian.inverse_diagonal() is None
    hessian.factor(0.05, input_order(hessian.matrix.diagonal(), act_order))
    mean = hessian.matrix.double().numpy() / 200
    damped = mean + 0.05 * np.diagonal(mean).mean() * np.eye(24)
    found = hessian.inverse_diagonal()
    assert found is not None
    np.testing.assert_allclose(found.numpy(), np.diagonal(np.linalg.inv(damped)), rtol=1e-3)


def test_twice_the_same_tokens_have_the_same_inverse_diagonal() -> None:
    x = correlated_inputs(12, 90)
    once, twice = observed(x), observed(torch.cat([x, x]))
    for hessian in (once, twice):
        hessian.factor(0.01, torch.arange(12))
    torch.testing.assert_close(once.inverse_diagonal(), twice.inverse_diagonal(), rtol=1e-3, atol=0)


def test_the_inverse_diagonal_of_an_input_that_was_never_active_is_infinite() -> None:
    x = correlated_inputs(6, 50)
    x[:, 2] = 0
    hessian = observed(x)
    hessian.factor(0.01, torch.arange(6).flip(0))
    found = hessian.inverse_diagonal()
    assert found is not None
    assert found.isinf().nonzero().flatten().tolist() == [2]
    hessian.update(x)
    assert hessian.inverse_diagonal() is None  # the factor is of older statistics
