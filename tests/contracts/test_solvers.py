"""What every method promises, for every kind of request. A new method adds its row here."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from ambient_states import STATES
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import SolverError
from quantine.kernels.gram import add_gram
from quantine.methods import METHODS
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR
from quantine.statistics.hessian import Hessian
from samples import FAITHFUL, correlated_inputs, observed, random_weight, threads

ROWS, COLUMNS, TOKENS = 8, 32, 96

WIDE_ROWS, WIDE_COLUMNS, WIDE_TOKENS = 32, 64, 160
"""Large enough for averages to show: greedy feedback may lose on a handful of rows."""

VARIANTS: dict[str, tuple[Solver, ...]] = {
    "rtn": (RTN(), RTN(clip="mse")),
    "gptq": (
        GPTQ(),
        GPTQ(clip="minmax"),
        GPTQ(groups="refit"),
        GPTQ(act_order=False, block_size=16),
        GPTQ(act_order=False, groups="refit"),
        GPTQ(groups="aligned", clip="hessian"),
    ),
    "spqr": (
        SpQR(),
        SpQR(threshold=0.5),
        SpQR(threshold=0.5, detect="simple", groups="refit"),
        SpQR(outliers=0.05, groups="static", clip="mse"),
        FAITHFUL,
    ),
}
SOLVERS = [pytest.param(s, id=str(s)) for variants in VARIANTS.values() for s in variants]
SPECS = [
    pytest.param(QuantSpec(bits, group_size, sym), id=f"{bits}b-g{group_size}-{sym and 'sym'}")
    for bits in range(2, 9)
    for group_size in (-1, 8, 16)
    for sym in (False, True)
] + [
    pytest.param(
        QuantSpec(bits, group_size, sym, group_axis="out"), id=f"{bits}b-out{group_size}-{sym}"
    )
    for bits in (2, 3, 8)
    for group_size in (-1, 1, 4)
    for sym in (False, True)
]


def solve(solver: Solver, weight: torch.Tensor, spec: QuantSpec) -> QTensor:
    return solver(weight, observed(correlated_inputs(weight.shape[1], TOKENS)), spec)


def wide_layer() -> tuple[torch.Tensor, Hessian]:
    weight = random_weight(WIDE_ROWS, WIDE_COLUMNS)
    return weight, observed(correlated_inputs(WIDE_COLUMNS, WIDE_TOKENS))


def check(solved: QTensor, weight: torch.Tensor, solver: Solver, spec: QuantSpec) -> None:
    """Everything a result must be, whatever the weight."""
    assert solved.codes.dtype == torch.uint8
    assert solved.codes.shape == weight.shape
    assert int(solved.codes.max()) < 2**spec.bits
    lines, length = spec.lines(*weight.shape)
    groups = length // spec.group_length(length)
    grid = solved.grid
    assert (grid.bits, grid.group_size) == (spec.bits, length // groups)
    assert grid.axis == spec.group_axis
    assert grid.scale.dtype == torch.float16
    assert grid.scale.shape == (lines, groups)
    assert bool((grid.scale > 0).all())
    assert bool(torch.isfinite(grid.scale).all())
    assert (grid.zero_point is None) == spec.sym
    if grid.zero_point is not None:
        assert grid.zero_point.dtype == torch.uint8
        assert grid.zero_point.shape == grid.scale.shape
        assert int(grid.zero_point.max()) < 2**spec.bits
    assert (solved.in_perm is not None) == solver.stores_order(spec)
    if solved.in_perm is not None:
        assert sorted(solved.in_perm.tolist()) == list(range(weight.shape[1]))
    assert (solved.outliers is not None) == (solver.outlier_share != 0)
    if solved.outliers is not None:
        assert solved.outliers.shape == tuple(weight.shape)
        assert bool(torch.isfinite(solved.outliers.values).all())
    assert bool(torch.isfinite(solved.dequantize()).all())


def test_every_method_is_covered() -> None:
    assert VARIANTS.keys() == METHODS.keys()
    for name, variants in VARIANTS.items():
        assert all(type(solver) is METHODS[name] for solver in variants)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_result_is_whole_and_repeatable(solver: Solver, spec: QuantSpec) -> None:
    weight = random_weight(ROWS, COLUMNS)
    before = weight.clone()
    solved = solve(solver, weight, spec)
    assert torch.equal(weight, before)
    check(solved, weight, solver, spec)
    again = solve(solver, weight, spec)
    assert torch.equal(solved.codes, again.codes)
    assert torch.equal(solved.grid.scale, again.grid.scale)
    assert torch.equal(solved.dequantize(), again.dequantize())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_the_caller_has_set_finds_the_same_bits(solver: Solver, state: str) -> None:
    weight, inputs = random_weight(ROWS, COLUMNS), correlated_inputs(COLUMNS, TOKENS)
    expected = solver(weight, observed(inputs), QuantSpec(3, 16)).dequantize()
    hessian = observed(inputs)
    with STATES[state]():
        found = solver(weight, hessian, QuantSpec(3, 16))
    assert torch.equal(found.dequantize(), expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_any_number_of_threads_finds_the_same_bits(solver: Solver) -> None:
    """Of one and the same Hessian: summing it up in float32 may depend on threads."""
    weight, hessian = random_weight(300, 288), observed(correlated_inputs(288, 600))
    found = []
    for count in (1, 2, 3):
        again = Hessian(288, add_gram)
        again.merge(hessian)
        with threads(count):
            found.append(solver(weight, again, QuantSpec(3, 16)).dequantize())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("solver", [p for p in SOLVERS if p.values[0].needs_inputs])
def test_error_is_at_most_that_of_rounding_to_nearest(solver: Solver, spec: QuantSpec) -> None:
    weight, hessian = wide_layer()
    clip = "minmax" if solver.clip == "minmax" else "mse"  # type: ignore[attr-defined]
    nearest = RTN(clip=clip)(weight, hessian, spec)
    error = hessian.error_energy(solver(weight, hessian, spec).dequantize() - weight)
    assert error <= hessian.error_energy(nearest.dequantize() - weight)


# With outliers, fewer bits keep more of them, which may more than make up for the bits.
@pytest.mark.parametrize("solver", [p for p in SOLVERS if p.values[0].outlier_share == 0])
def test_more_bits_mean_less_error(solver: Solver) -> None:
    weight, hessian = wide_layer()
    errors = [
        hessian.error_energy(solver(weight, hessian, QuantSpec(bits, 16)).dequantize() - weight)
        for bits in range(2, 9)
    ]
    # One more bit halves the step, which quarters the squared error; a half is asked for.
    assert all(more <= less / 2 for less, more in pairwise(errors))


EXTREMES = {
    "all zero": torch.zeros(3, COLUMNS),
    "constant positive": torch.full((3, COLUMNS), 0.25),
    "constant negative": torch.full((3, COLUMNS), -0.25),
    "tiny": random_weight(3, COLUMNS).mul(2e-29),
    "one huge": random_weight(3, COLUMNS).index_fill(1, torch.tensor([17]), 6e4),
}


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(2, 16),
        QuantSpec(4, -1, sym=True),
        QuantSpec(8, 1),
        QuantSpec(3, 3, group_axis="out"),
    ],
)
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_extreme_weights(solver: Solver, name: str, spec: QuantSpec) -> None:
    weight = EXTREMES[name]
    solved = solve(solver, weight, spec)
    check(solved, weight, solver, spec)
    if name == "all zero":
        assert not solved.dequantize().any()
    if name == "tiny":
        usual = solve(solver, weight * 2.0**95, spec).dequantize()
        assert torch.allclose(solved.dequantize() * 2.0**95, usual, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_keeps_a_constant_row_to_float16(bits: int, sign: int) -> None:
    weight = torch.full((2, COLUMNS), 0.3 * sign)
    error = (RTN()(weight, None, QuantSpec(bits, 16)).dequantize() - weight).abs().max()
    # Each end of a range is a code; only the scale is rounded, by at most 2**-11 of itself.
    assert error <= 0.3 * 2**-11


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e8])
@pytest.mark.parametrize("spec", [QuantSpec(8, 16), QuantSpec(8, 3, group_axis="out")])
@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_that_no_scale_holds_are_refused(
    solver: Solver, spec: QuantSpec, value: float
) -> None:
    weight = random_weight(3, COLUMNS)
    weight[1, 5] = value
    with pytest.raises(SolverError, match="float16"):
        solve(solver, weight, spec)


@pytest.mark.parametrize("scale_bits", [16, 4])
@pytest.mark.parametrize("solver", [p for p in SOLVERS if p.values[0].outlier_share == 0])
def test_a_loud_input_costs_the_others_nothing_where_groups_run_along_outputs(
    solver: Solver, scale_bits: int
) -> None:
    weight, hessian = random_weight(48, 64), Hessian(64, add_gram)
    hessian.matrix, hessian.tokens = torch.eye(64), 1
    loud = weight.clone()
    loud[:, 7] *= 40
    others = torch.arange(64) != 7
    for axis, harmed in (("in", True), ("out", False)):
        # Runs of one: inputs do not share second grids.
        spec = QuantSpec(3, 16, scale_bits=scale_bits, stat_group_size=1, group_axis=axis)
        before, after = (
            (solver(one, hessian, spec).dequantize() - one)[:, others].square().sum()
            for one in (weight, loud)
        )
        assert (after > 1.5 * before) == harmed


@pytest.mark.parametrize("solver", [p for p in SOLVERS if p.values[0].needs_inputs])
def test_hessians_that_cannot_be_used_are_refused(solver: Solver) -> None:
    weight, broken = random_weight(3, COLUMNS), observed(correlated_inputs(COLUMNS, TOKENS))
    broken.matrix[4, 4] = math.nan
    for hessian in (broken, None, Hessian(COLUMNS, add_gram)):
        with pytest.raises(SolverError, match=r"not finite|needs calibration inputs"):
            solver(weight, hessian, QuantSpec(4, 16))


@pytest.mark.parametrize("solver", [p for p in SOLVERS if p.values[0].needs_inputs])
def test_dead_and_repeated_inputs(solver: Solver) -> None:
    # Fewer tokens than inputs, equal inputs, inputs that are always zero: rank 5 of 32.
    x = correlated_inputs(COLUMNS, 5)
    x[:, 10:15] = x[:, 20:25]
    x[:, ::9] = 0
    weight, hessian, spec = random_weight(ROWS, COLUMNS), observed(x), QuantSpec(3, 16)
    check(solver(weight, hessian, spec), weight, solver, spec)
    assert hessian.damp_used is not None


def test_growing_damping_is_recorded() -> None:
    hessian = observed(correlated_inputs(COLUMNS, 3))
    GPTQ(damp=1e-9)(random_weight(ROWS, COLUMNS), hessian, QuantSpec(4, 16))
    assert hessian.damp_used is not None
    assert 1e-9 < hessian.damp_used <= 1
