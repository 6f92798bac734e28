"""The native fit of groups against the PyTorch code that defines it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.spec import QuantSpec
from quantine.errors import SolverError
from quantine.kernels.fit import fit_groups
from quantine.kernels.fit.grid_cost import Clip, GridCost, positive, rounding_errors
from quantine.kernels.fit.reference import fit_groups_reference, without_outliers
from samples import generator, quick, threads


def groups_of(shape: tuple[int, int, int], kind: str, seed: int) -> Tensor:
    """Weights ``[groups, n, rows]`` of a kind that is hard in its own way."""
    weights = torch.randn(shape, generator=generator(seed)) * 0.05
    if kind == "ties":
        return (weights * 40).round() * 0.03
    if kind == "far":
        return weights + torch.randint(-3, 4, (shape[0], 1, shape[2]), generator=generator(seed))
    if kind == "outliers":
        weights[:, 0, ::2] *= 30
    if kind == "mixed":
        weights *= 10.0 ** torch.randint(-9, 3, (shape[0], 1, shape[2]), generator=generator(seed))
    if kind == "equal":
        weights[:] = 0.3
    return weights


def total_cost(columns: Tensor, spread: Tensor, grid: Grid, cost: GridCost) -> Tensor:
    """The cost's cost ``[groups, rows]`` in float64."""
    scale, zero = positive(grid.scales().T), grid.zeros().T
    errors = rounding_errors(columns, scale, zero, grid.bits).double()
    if cost.clip == "mse":
        return errors.abs().pow(2.4).sum(1)
    squares = errors.square() / spread.square().unsqueeze(-1)
    return squares.clamp(max=cost.price).sum(1)


specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    sym=st.booleans(),
    scale_bits=st.sampled_from([2, 3, 5, 8, 16]),
    stat_group_size=st.sampled_from([-1, 1, 7, 16, 64, 100]),
)
fractional = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    scale_bits=st.sampled_from([2, 3, 8, 16]),
    zero_bits=st.sampled_from([2, 3, 8, 16]),
    stat_group_size=st.sampled_from([-1, 1, 16, 64]),
)


@quick
@given(
    n=st.sampled_from([1, 2, 3, 16, 33]),
    rows=st.sampled_from([1, 2, 63, 64, 65, 200]),
    spec=st.one_of(specs, fractional),
    clip=st.sampled_from(["minmax", "mse", "hessian"]),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    look_ahead=st.booleans(),
    kind=st.sampled_from(["plain", "ties", "far", "outliers", "mixed", "equal"]),
    seed=st.integers(0, 10**6),
)
def test_grids_are_fitted_alike(
    n: int,
    rows: int,
    spec: QuantSpec,
    clip: Clip,
    price: float,
    look_ahead: bool,
    kind: str,
    seed: int,
) -> None:
    columns = groups_of((2, n, rows), kind, seed)
    spread = torch.rand(2, n, generator=generator(seed)) + 0.05
    cost = GridCost(clip, price, look_ahead)
    found = fit_groups(columns, spread, spec, cost)
    expected = fit_groups_reference(columns, spread, spec, cost)
    assert type(found.scale) is type(expected.scale)
    assert type(found.zero_point) is type(expected.zero_point)
    same = (found.scales() == expected.scales()) & (found.zeros() == expected.zeros())
    # One row whose tie tips may move the second grid of a whole run.
    if kind in {"plain", "outliers"} and not spec.second_level and rows > 50:
        assert same.float().mean() >= 0.97
    losing = columns
    if clip == "mse" and look_ahead and price < math.inf:
        losing = without_outliers(columns, spread, spec, cost)
    costs = [total_cost(losing, spread, grid, cost).sum() for grid in (found, expected)]
    if clip != "minmax":
        assert costs[0] <= costs[1] * 1.05 + 1e-12


@quick
@given(
    n=st.sampled_from([1, 2, 16, 33]),
    lines=st.sampled_from([64, 65, 200]),
    bits=st.integers(2, 8),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    look_ahead=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_lines_with_a_spread_each_are_fitted_as_one_by_one(
    n: int, lines: int, bits: int, price: float, look_ahead: bool, seed: int
) -> None:
    columns = groups_of((2, n, lines), "outliers", seed)
    spread = torch.rand(lines, generator=generator(seed)) + 0.05
    cost = GridCost("hessian", price, look_ahead)
    spec = QuantSpec(bits, n, group_axis="out")
    for fit_with in (fit_groups, fit_groups_reference):
        whole = fit_with(columns, spread, spec, cost)
        assert whole.axis == "out"
        alone = QuantSpec(bits, n)
        for line in (0, lines - 1):
            same = torch.full((2, n), float(spread[line]))
            one = fit_with(columns[..., line : line + 1], same, alone, cost)
            found = Grid(whole.scales()[line : line + 1], whole.zeros()[line : line + 1], bits, n)
            costs = [
                float(total_cost(columns[..., line : line + 1], same, grid, cost).sum())
                for grid in (found, one)
            ]
            assert costs[0] == pytest.approx(costs[1], rel=0.02, abs=1e-9)


@pytest.mark.parametrize("clip", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("spec", [QuantSpec(3, 16), QuantSpec(2, 16, True), QuantSpec(8, 16)])
def test_without_second_grids_rows_do_not_depend_on_their_place(
    spec: QuantSpec, look_ahead: bool, clip: Clip
) -> None:
    columns, spread = groups_of((1, 16, 150), "outliers", 3), torch.rand(1, 16) + 0.1
    cost = GridCost(clip, 0.01, look_ahead)
    whole = fit_groups(columns, spread, spec, cost)
    order = torch.randperm(150, generator=generator(0))[:77]
    part = fit_groups(columns[..., order], spread, spec, cost)
    assert torch.equal(part.scales(), whole.scales()[order])
    assert torch.equal(part.zeros(), whole.zeros()[order])


@pytest.mark.parametrize("spec", [QuantSpec(3, 16), QuantSpec(2, 16, scale_bits=3, zero_bits=3)])
def test_any_number_of_threads_finds_the_same_bits(spec: QuantSpec) -> None:
    columns, spread = groups_of((9, 16, 150), "outliers", 3), torch.rand(9, 16) + 0.1
    found = []
    for count in (1, 2, 3, 8):
        with threads(count):
            found.append(fit_groups(columns, spread, spec, GridCost("hessian", 0.01, True)))
    for grid in found[1:]:
        assert torch.equal(grid.scales(), found[0].scales())
        assert torch.equal(grid.zeros(), found[0].zeros())


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(2, 8),
        QuantSpec(2, 8, True),
        QuantSpec(2, 8, scale_bits=3),
        QuantSpec(2, 8, zero_bits=3),
        QuantSpec(2, 8, scale_bits=3, zero_bits=3),
    ],
)
@pytest.mark.parametrize("fit_with", [fit_groups, fit_groups_reference])
@pytest.mark.parametrize("value", [3e38, 1e6, math.inf, math.nan])
def test_what_does_not_fit_into_float16_is_refused(
    value: float, fit_with: object, spec: QuantSpec
) -> None:
    columns = groups_of((1, 8, 100), "plain", 0)
    columns[0, 3, 99], columns[0, 4, 99] = value, -value
    with pytest.raises(SolverError, match="rescale the weights, or leave this layer in 16 bit"):
        fit_with(columns, torch.ones(1, 8), spec, GridCost("hessian"))  # type: ignore[operator]
