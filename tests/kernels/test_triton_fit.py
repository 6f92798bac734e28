"""Fits of groups on GPUs, in Triton's interpreter, against the PyTorch code that defines them."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_device import DEVICE, EXAMPLES, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fit import fractional, groups_of, specs, total_cost

from quantine.core.spec import QuantSpec
from quantine.errors import SolverError
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import Clip, GridCost
from quantine.kernels.fit.reference import fit_groups_reference, without_outliers
from samples import generator, quick

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from quantine.kernels.fit.triton.groups import fit_groups, launch_of, share_of


@settings(quick, max_examples=EXAMPLES)
@given(
    groups=st.sampled_from([1, 2, 3]),
    n=st.sampled_from([1, 2, 3, 16, 33]),
    lines=st.sampled_from([1, 2, 17, 33]),
    spec=st.one_of(specs, fractional),
    clip=st.sampled_from(["minmax", "mse", "hessian"]),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    look_ahead=st.booleans(),
    of_lines=st.booleans(),
    transposed=st.booleans(),
    kind=st.sampled_from(["plain", "ties", "far", "outliers", "mixed", "equal"]),
    seed=st.integers(0, 10**6),
)
def test_grids_are_fitted_alike(
    groups: int,
    n: int,
    lines: int,
    spec: QuantSpec,
    clip: Clip,
    price: float,
    look_ahead: bool,
    of_lines: bool,
    transposed: bool,
    kind: str,
    seed: int,
) -> None:
    columns = groups_of((groups, n, lines), kind, seed)
    if transposed:  # as those of a matrix whose groups run along inputs are
        columns = columns.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    shape = (lines,) if of_lines else (groups, n)
    spread = torch.rand(shape, generator=generator(seed)) + 0.05
    cost = GridCost(clip, price, look_ahead)
    expected = fit_groups_reference(columns, spread, spec, cost)
    found = moved(fit_groups(moved(columns), moved(spread), spec, cost), "cpu")
    assert type(found.scale) is type(expected.scale)
    assert type(found.zero_point) is type(expected.zero_point)
    same = (found.scales() == expected.scales()) & (found.zeros() == expected.zeros())
    if DEVICE == "cpu" and kind in {"plain", "outliers"}:
        assert same.float().mean() >= min(0.97, 1 - 1.5 / lines)
    losing = columns
    if clip == "mse" and cost.leaves_out:
        losing = without_outliers(columns, spread, spec, cost)
    if clip != "minmax" and not of_lines:
        costs = [total_cost(losing, spread, grid, cost).sum() for grid in (found, expected)]
        assert costs[0] <= costs[1] * 1.05 + 1e-12


@pytest.mark.parametrize("large", [1e6, math.nan])
def test_what_float16_does_not_hold_is_refused(large: float) -> None:
    columns = groups_of((1, 4, 3), "plain", 0)
    columns[0, 1, 2] = large
    with pytest.raises(SolverError, match=r"a group needs a scale of .*: rescale the weights"):
        fit_groups(moved(columns), moved(torch.ones(1, 4)), QuantSpec(3, 4), GridCost("mse"))


@pytest.mark.parametrize(
    ("length", "lines", "cost", "held"),
    [
        (600, 19, GridCost("mse"), 8),
        (600, 3, GridCost("hessian", 0.01, look_ahead=True), 8),
        (8193, 2, GridCost("hessian"), 1),  # a whole row
        (8193, 2, GridCost("hessian", 0.01, look_ahead=True), 0),  # registers do not hold it
        (16385, 2, GridCost("minmax"), 0),
    ],
)
def test_long_groups_have_fewer_lines_in_a_program(
    length: int, lines: int, cost: GridCost, held: int
) -> None:
    columns, spread = groups_of((1, length, lines), "plain", 0), torch.ones(1, length)
    spec = QuantSpec(3, length)
    fitted = FittedGroups.empty(1, lines, length, spec, columns.device)
    share = share_of(fitted, cost)
    assert (0 if share is None else share.runs * share.span) == held
    found = moved(fit_groups(moved(columns), moved(spread), spec, cost), "cpu")
    expected = fit_groups_reference(columns, spread, spec, cost)
    torch.testing.assert_close(found.scales(), expected.scales())
    torch.testing.assert_close(found.zeros(), expected.zeros())


@pytest.mark.parametrize(("length", "lines"), [(8192, 128256), (3584, 256000), (16, 256000)])
def test_a_launch_for_many_lines_has_one_axis(length: int, lines: int) -> None:
    # CUDA refuses more than 65535 programs along the second and the third.
    columns = torch.empty(2, length, lines, device="meta")
    spec, cost = QuantSpec(4, length), GridCost("mse")
    fitted = FittedGroups.empty(2, lines, length, spec, columns.device)
    share = share_of(fitted, cost)
    assert share is not None
    grid, _, _ = launch_of(columns, torch.ones(2, length), fitted, cost, share)
    assert grid == (2 * share.programs(lines),)
