"""The column loop on GPUs, in Triton's interpreter, against the PyTorch code that defines it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gpu_device import DEVICE, EXAMPLES, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from test_columns import (
    CPU,
    check_coupled,
    columns_of,
    copied,
    coupled,
    factor,
    grids,
    share_differing,
)
from test_fit import fractional, groups_of, specs
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.spec import FLOAT16, GroupAxis, QuantSpec
from quantine.errors import SolverError
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.columns.reference import round_block_reference
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost
from samples import generator, quick

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from quantine.kernels.columns.triton.columns import round_block, share_of

ROUNDED_ALIKE = 0.005
"""Largest share of rows in which another order of float32 sums may tip a tie."""


@quick
@given(
    n=st.integers(1, 40),
    rows=st.sampled_from([1, 3, 16, 33]),
    bits=st.integers(2, 8),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_known_grids_round_alike(
    n: int, rows: int, bits: int, price: float, seed: int, data: st.DataObject
) -> None:
    weight = torch.randn(rows, n, generator=generator(seed)) * 0.1
    weight[rows // 2] = 0.0  # a row without outliers among others, and one of nothing else
    weight[0] += 1000.0
    groups = torch.randint(0, 3, (n,), generator=generator(seed))
    expected = columns_of(weight, factor(n, seed), bits, grids(3, rows, bits, seed), groups, price)
    found = moved(copied(expected))
    cut = data.draw(st.integers(0, n))
    for start, stop in ((0, cut), (cut, n)):
        round_block(found, start, stop)
        round_block_reference(expected, start, stop)
    found = moved(found, "cpu")
    assert share_differing(found, expected, n) <= max(ROUNDED_ALIKE, 1.5 / rows)
    if found.kept is not None:
        assert bool(found.kept[:, 0].all())
        assert rows == 1 or not bool(found.kept[:, rows // 2].any())


@settings(quick, max_examples=EXAMPLES)
@given(
    n=st.integers(1, 4),
    rows=st.sampled_from([1, 3, 16, 33, 150]),
    run=st.sampled_from([1, 2, 5, 16, 70]),
    bits=st.integers(2, 8),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    seed=st.integers(0, 10**6),
)
def test_coupled_rows_make_up_for_each_other(
    n: int, rows: int, run: int, bits: int, price: float, seed: int
) -> None:
    weight = torch.randn(rows, n, generator=generator(seed)) * 0.1
    groups = torch.randint(0, 3, (n,), generator=generator(seed))
    known = columns_of(weight, factor(n, seed), bits, grids(3, rows, bits, seed), groups, price)
    found = moved(replace(known, coupling=coupled(rows, run, seed)))
    round_block(found, 0, n)
    check_coupled(moved(found, "cpu"), weight)


KINDS = st.sampled_from(["plain", "outliers", "far", "mixed", "dead"])
COSTS = st.builds(
    GridCost,
    clip=st.sampled_from(["minmax", "mse", "hessian"]),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    look_ahead=st.booleans(),
)


def weights_of(kind: str, rows: int, inputs: int, seed: int) -> Tensor:
    """``[rows, inputs]`` of a kind of `groups_of`; of ``dead`` ones some columns are zero."""
    weight = groups_of((1, inputs, rows), "plain" if kind == "dead" else kind, seed)[0].T
    if kind == "dead":
        weight[:, seed % inputs :: 3] = 0.0
    return weight.contiguous()


def check_alike(
    started: Callable[[], Columns], blocks: list[tuple[int, int]], spec: QuantSpec
) -> None:
    """Check that programs round, and fit, as the reference does."""
    found, expected = on_device(started()), started()
    for start, stop in blocks:
        round_block(found, start, stop)
        round_block_reference(expected, start, stop)
    found = moved(found, "cpu")
    assert found.at_reach is not None
    assert expected.at_reach is not None
    one, other = found.at_reach.fitted, expected.at_reach.fitted
    one.check()
    total = expected.errors.square().sum()
    torch.testing.assert_close(found.errors.square().sum(), total, rtol=0.05, atol=1e-6)
    if DEVICE != "cpu" and spec.second_level:
        return  # a GPU sums in another order, and one row's tie moves the second grid of others
    rows, inputs = found.weights.shape[1], len(found.weights)
    allowed = max(0.03, 1.5 / rows)
    assert share_differing(found, expected, inputs) <= allowed
    levels = ((one.scale, other.scale, spec.scale_bits), (one.zero, other.zero, spec.zero_bits))
    for mine, reference, bits in levels:
        alike = torch.isclose(mine.values, reference.values, rtol=1e-4, atol=1e-7)
        assert float((~alike).float().mean()) <= allowed
        if bits not in {0, FLOAT16}:
            assert float((mine.codes != reference.codes).float().mean()) <= allowed
            assert torch.allclose(mine.step, reference.step, rtol=1e-3)


def on_device(columns: Columns) -> Columns:
    """``columns`` on the device. What was one tensor before it moved is one after."""
    columns = moved(columns)
    assert columns.at_reach is not None
    fitted = columns.at_reach.fitted
    if fitted.spec.group_axis == "out":
        return columns
    return replace(columns, scales=fitted.scale.values, zeros=fitted.zero.values)


@settings(quick, max_examples=EXAMPLES)
@given(
    groups=st.integers(1, 2),
    length=st.sampled_from([1, 2, 5, 16]),
    rows=st.sampled_from([1, 3, 16, 21]),
    spec=st.one_of(specs, fractional),
    cost=COSTS,
    kind=KINDS,
    cut=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_groups_are_fitted_when_they_are_reached(
    groups: int,
    length: int,
    rows: int,
    spec: QuantSpec,
    cost: GridCost,
    kind: str,
    cut: bool,
    seed: int,
) -> None:
    inputs = groups * length
    weight, upper = weights_of(kind, rows, inputs, seed), factor(inputs, seed)

    def started() -> Columns:
        fitted = FittedGroups.empty(groups, rows, length, spec, CPU)
        at_reach = AtReach(fitted, upper.upper.diagonal().clone(), cost)
        values, number = (fitted.scale.values, fitted.zero.values), torch.arange(inputs) // length
        return columns_of(weight, upper, spec.bits, values, number, cost.price, at_reach)

    middle = groups // 2 * length if cut else 0
    check_alike(started, [(0, middle), (middle, inputs)], spec)


@settings(quick, max_examples=EXAMPLES)
@given(
    inputs=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 9]),
    length=st.sampled_from([1, 2, 5, 16]),
    spec=st.one_of(specs, fractional),
    cost=COSTS,
    kind=KINDS,
    seed=st.integers(0, 10**6),
)
def test_groups_of_outputs_are_fitted_when_their_column_is_reached(
    inputs: int,
    groups: int,
    length: int,
    spec: QuantSpec,
    cost: GridCost,
    kind: str,
    seed: int,
) -> None:
    rows = groups * length
    weight, upper = weights_of(kind, rows, inputs, seed), factor(inputs, seed)
    spec = replace(spec, group_size=length, group_axis="out")
    second = tuple(
        None
        if bits in {0, FLOAT16}
        else Grid(torch.full((inputs, groups), step), torch.full((inputs, groups), -1.0), bits, 1)
        for bits, step in ((spec.scale_bits, 0.008), (spec.zero_bits, 0.4))
    )

    def started() -> Columns:
        fitted = FittedGroups.of_columns(inputs, rows, spec, (second[0], second[1]), CPU)
        at_reach = AtReach(fitted, upper.upper.diagonal().clone(), cost)
        room, number = (torch.empty(1, rows), torch.empty(1, rows)), torch.zeros(inputs).long()
        return columns_of(weight, upper, spec.bits, room, number, cost.price, at_reach)

    check_alike(started, [(0, inputs // 2), (inputs // 2, inputs)], spec)


@pytest.mark.parametrize(
    ("length", "run", "axis", "stop"),
    [
        (16, -1, "in", 16),  # the rows of a second grid are more than registers hold
        (300, 1, "out", 1),  # a group of outputs is
        (16, 16, "in", 8),  # the group ends after the block
    ],
)
def test_what_registers_do_not_hold_is_fitted_by_the_reference(
    length: int, run: int, axis: GroupAxis, stop: int
) -> None:
    rows = length if axis == "out" else 300 if run < 0 else 3
    inputs = 2 * stop if length != stop else stop
    scale_bits = FLOAT16 if axis == "out" else 3
    spec = QuantSpec(3, length, scale_bits=scale_bits, stat_group_size=run, group_axis=axis)
    weight, upper = weights_of("plain", rows, inputs, 0), factor(inputs, 0)

    def started() -> Columns:
        if axis == "out":
            fitted = FittedGroups.of_columns(inputs, rows, spec, (None, None), CPU)
            values, number = (torch.empty(1, rows),) * 2, torch.zeros(inputs).long()
        else:
            fitted = FittedGroups.empty(inputs // length, rows, length, spec, CPU)
            values = fitted.scale.values, fitted.zero.values
            number = torch.arange(inputs) // length
        at_reach = AtReach(fitted, upper.upper.diagonal().clone(), GridCost("minmax"))
        return columns_of(weight, upper, 3, values, number, math.inf, at_reach)

    at_reach = started().at_reach
    assert (share_of(at_reach) is None) == (stop != 8)
    check_alike(started, [(0, stop), (stop, inputs)], spec)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, by which it is interpreted
@pytest.mark.parametrize("large", [1e7, math.nan, math.inf])
@pytest.mark.parametrize("spec", [QuantSpec(3, 4), QuantSpec(3, 4, zero_bits=16, scale_bits=3)])
def test_what_float16_does_not_hold_is_noted(spec: QuantSpec, large: float) -> None:
    weight, upper = weights_of("plain", 3, 4, 0), factor(4, 0)
    weight[1, 2] = large
    fitted = FittedGroups.empty(1, 3, 4, spec, CPU)
    at_reach = AtReach(fitted, torch.ones(4), GridCost("minmax"))
    values = fitted.scale.values, fitted.zero.values
    columns = columns_of(weight, upper, 3, values, torch.zeros(4).long(), math.inf, at_reach)
    columns = on_device(columns)
    round_block(columns, 0, 4)
    assert columns.at_reach is not None
    with pytest.raises(SolverError, match=r"float16.*rescale the weights"):
        columns.at_reach.fitted.check()
