"""Weights of any size are quantized alike: a power of two on the weights is one on the result."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.formats import format_named
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.reference import multiply_reference as multiply_integers
from quantine.kernels.matrix import multiply, packed_matrix
from quantine.kernels.matrix.reference import multiply_reference
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.small_weights import exponent_of
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR
from samples import FAITHFUL, FAITHFUL_SPEC, correlated_inputs, observed, quick, random_weight

ROWS, COLUMNS = 32, 64
SOLVERS: tuple[Solver, ...] = (
    RTN(),
    RTN(clip="mse"),
    GPTQ(),
    GPTQ(groups="refit"),
    SpQR(),
    SpQR(outliers=0.05),
    FAITHFUL,
)
SPECS = (
    QuantSpec(8, -1),
    QuantSpec(8, 16, sym=True),
    QuantSpec(3, 16),
    QuantSpec(8, 16, group_axis="out"),
    QuantSpec(4, 16, scale_bits=3, stat_group_size=64),
    QuantSpec(4, 16, zero_bits=16),
    QuantSpec(3, 16, scale_bits=4, zero_bits=4, group_axis="out"),
    FAITHFUL_SPEC,
)
WEIGHT = random_weight(ROWS, COLUMNS)


def relative_error(solver: Solver, spec: QuantSpec, layout: str, weight: Tensor) -> float:
    """The error of a matrix as a format holds it, as a share of its norm."""
    qtensor = solver(weight, observed(correlated_inputs(COLUMNS, 96)), spec)
    packed = format_named(layout)
    held = packed.unpack(packed.pack(qtensor), spec, COLUMNS).dequantize()
    return float((held - weight).norm() / weight.norm())


@quick
@given(
    st.sampled_from(SOLVERS),
    st.sampled_from(SPECS),
    st.integers(-30, 8),
    st.sampled_from(["dense", "sparse", "spqr"]),
)
def test_the_error_does_not_depend_on_the_size_of_weights(
    solver: Solver, spec: QuantSpec, power: int, layout: str
) -> None:
    if not format_named(layout).supports(spec, solver.outlier_share != 0):
        return
    expected = relative_error(solver, spec, layout, WEIGHT)
    if layout == "spqr" and power < -12:
        with pytest.raises(FormatError, match=r"weights are so small .* use sparse"):
            relative_error(solver, spec, layout, WEIGHT * 2.0**power)
        return
    if layout == "spqr" and power < -7:
        return  # some are refused
    found = relative_error(solver, spec, layout, WEIGHT * 2.0**power)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("power", [-1, -3, -6, -10, -16, -24, -30])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_where_there_is_an_exponent_codes_are_those_of_a_multiple(
    solver: Solver, spec: QuantSpec, power: int
) -> None:
    hessian = observed(correlated_inputs(COLUMNS, 96))
    found = solver(WEIGHT * 2.0**power, hessian, spec)
    if not found.grid.exponent:
        return
    multiple = solver(WEIGHT * 2.0 ** (power - found.grid.exponent), hessian, spec)
    assert multiple.grid.exponent == 0
    assert torch.equal(found.codes, multiple.codes)
    expected = multiple.dequantize() * 2.0**found.grid.exponent
    assert torch.equal(found.dequantize(), expected)


def test_weights_of_usual_size_have_no_exponent() -> None:
    assert exponent_of(WEIGHT, QuantSpec(8, -1)) == 0
    assert exponent_of(torch.zeros(3, 4), QuantSpec(8, -1)) == 0
    assert exponent_of(torch.full((3, 4), 1e-3), QuantSpec(3, -1)) == 0
    assert "exponent" not in format_named("dense").pack(RTN()(WEIGHT, None, QuantSpec(8, 16)))


@pytest.mark.parametrize("axis", [0, 1])
def test_each_row_and_column_counts_beside_much_larger_ones(axis: int) -> None:
    powers = torch.linspace(0, -16, WEIGHT.shape[axis]).round()
    factors = torch.pow(2.0, powers)
    weight = WEIGHT * (factors.unsqueeze(1) if axis == 0 else factors)
    spec = QuantSpec(8, -1, group_axis="in" if axis == 0 else "out")
    found = RTN()(weight, None, spec)
    assert found.grid.exponent
    errors = (found.dequantize() - weight).norm(dim=1 - axis) / weight.norm(dim=1 - axis)
    usual = (RTN()(WEIGHT, None, spec).dequantize() - WEIGHT).norm(dim=1 - axis)
    usual = usual / WEIGHT.norm(dim=1 - axis)
    assert torch.allclose(errors, usual, rtol=0.01)


def test_rows_that_are_next_to_nothing_ask_for_no_exponent() -> None:
    weight = WEIGHT.clone()
    weight[3], weight[5] = 0.0, weight[5] * 1e-20
    found = RTN()(weight, None, QuantSpec(8, -1))
    assert found.grid.exponent == 0
    assert float((found.dequantize() - weight).abs().max()) < 1e-3


@pytest.mark.parametrize("power", [-12, -30, -90])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.group_axis == "in"])
def test_products_with_small_weights_are_small_multiples(spec: QuantSpec, power: int) -> None:
    solved = SpQR(outliers=0.05)(WEIGHT, observed(correlated_inputs(COLUMNS, 96)), spec)
    outliers = solved.outliers
    assert outliers is not None
    small = replace(
        solved,
        grid=replace(solved.grid, exponent=power),
        outliers=replace(outliers, values=outliers.values.float() * 2.0**power),
    )
    x = correlated_inputs(COLUMNS, 5)
    for arithmetic in ("exact", "fast"):
        expected = multiply_reference(solved, x, arithmetic) * 2.0**power
        found = [multiply_reference(small, x, arithmetic)]
        matrix = packed_matrix(small)
        if matrix is not None:
            found += multiply([matrix], x, arithmetic)
        for product in found:
            assert torch.allclose(product, expected, rtol=1e-3, atol=1e-4 * 2.0**power)
    grid = InputGrid(8)
    codes = multiply_integers(solved, grid, x) * 2.0**power
    assert torch.allclose(multiply_integers(small, grid, x), codes, rtol=1e-5)


def test_a_matrix_with_an_infinity_is_still_refused_by_its_scales() -> None:
    weight = WEIGHT * 1e-8
    weight[0, 0] = math.inf
    assert exponent_of(weight, QuantSpec(8, -1)) == 0


def test_predicted_losses_are_those_of_a_multiple() -> None:
    hessian = observed(correlated_inputs(COLUMNS, 96))
    losses, share = SpQR().predict(WEIGHT, hessian, SpQR.default_spec)
    small, same = SpQR().predict(WEIGHT * 2.0**-20, hessian, SpQR.default_spec)
    assert same == pytest.approx(share, abs=2e-3)
    assert torch.allclose(small * 2.0**40, losses, rtol=0.02)
