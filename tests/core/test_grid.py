"""The affine grid against hand-computed values and the textbook loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from quantine.core.fit_range import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    fit_fractional,
    fit_statistic,
    fit_whole,
)
from quantine.core.grid import Grid, Statistic
from quantine.errors import SolverError
from samples import quick, random_weight

finite = st.floats(-1e4, 1e4, width=32)


def fit_minmax(groups: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid from the smallest to the largest value of each group ``[..., n]``."""
    return fit_whole(*groups.aminmax(dim=-1), bits, sym)


def test_asymmetric_grid_by_hand() -> None:
    scale, zero = fit_minmax(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), bits=2, sym=False)
    assert (scale.item(), zero.item()) == (1.0, 1.0)
    grid = Grid(scale.half().view(1, 1), zero.to(torch.uint8).view(1, 1), 2, 4)
    codes = grid.encode(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]))
    assert codes.tolist() == [[0, 1, 2, 3]]  # 0.5 is a tie: the code becomes even
    assert grid.decode(codes).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_symmetric_grid_by_hand() -> None:
    scale, zero = fit_minmax(torch.tensor([[-4.0, 1.0]]), bits=3, sym=True)
    assert (scale.item(), zero.item()) == (1.0, 4.0)  # 4 steps below zero, 3 above
    grid = Grid(scale.half().view(1, 1), None, 3, 2)
    assert grid.zeros().tolist() == [[4.0]]
    assert grid.decode(torch.tensor([[0, 7]], dtype=torch.uint8)).tolist() == [[-4.0, 3.0]]


def test_symmetric_grid_covers_the_largest_positive_value() -> None:
    # 3 positive steps only: the range is set by the positive end.
    scale, _ = fit_minmax(torch.tensor([[-1.0, 3.0]]), bits=3, sym=True)
    assert scale.item() == 1.0


def test_groups_are_consecutive_columns() -> None:
    grid = Grid(
        torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.float16),
        torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8),
        bits=4,
        group_size=2,
    )
    codes = torch.tensor([[5, 6, 5, 6], [5, 6, 5, 6]], dtype=torch.uint8)
    assert grid.decode(codes).tolist() == [[5, 6, 8, 10], [12, 16, 16, 24]]


def test_codes_saturate_at_both_ends() -> None:
    grid = Grid(torch.ones(1, 1).half(), torch.full((1, 1), 3, dtype=torch.uint8), 3, 3)
    assert grid.encode(torch.tensor([[-1e9, 0.0, 1e9]])).tolist() == [[0, 3, 7]]


@quick
@given(values=st.lists(finite, min_size=1, max_size=12), bits=st.integers(2, 8), sym=st.booleans())
def test_fit_equals_the_textbook(values: list[float], bits: int, sym: bool) -> None:
    scale, zero = fit_minmax(torch.tensor([values]), bits, sym)
    expected_scale, expected_zero = oracles.fit_minmax(values, bits, sym)
    # Float32 and float64 may fall on two sides of a tie: one step of float16, one of the zero.
    step = max(expected_scale * 2.0**-10, SMALLEST_SCALE)
    assert abs(scale.item() - expected_scale) <= step
    assert abs(zero.item() - expected_zero) <= 1
    assert scale.item() == float(np.float16(scale.item()))
    assert zero.item() == int(zero.item())
    assert 0 <= zero.item() <= 2**bits - 1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [False, True])
def test_codes_and_values_equal_the_textbook(bits: int, sym: bool) -> None:
    weight = random_weight(6, 48)
    scale, zero = fit_minmax(weight.view(6, 3, 16), bits, sym)
    grid = Grid(scale.half(), None if sym else zero.to(torch.uint8), bits, 16)
    codes = grid.encode(weight)
    decoded = grid.decode(codes)
    expected = oracles.rtn(weight.double().numpy(), bits, 16, sym)
    assert np.array_equal(codes.numpy(), expected.codes)
    assert np.array_equal(decoded.double().numpy(), expected.values)  # exact in float32


@quick
@given(
    exponent=st.integers(-24, 15),
    fraction=st.integers(0, 1023),
    code=st.integers(0, 255),
    zero=st.integers(0, 255),
)
def test_decoding_is_exact_in_float32(exponent: int, fraction: int, code: int, zero: int) -> None:
    scale = float(np.float16(min((1 + fraction / 1024) * 2.0**exponent, LARGEST_SCALE)))
    grid = Grid(
        torch.tensor([[scale]], dtype=torch.float16),
        torch.tensor([[zero]], dtype=torch.uint8),
        bits=8,
        group_size=1,
    )
    decoded = grid.decode(torch.tensor([[code]], dtype=torch.uint8)).item()
    assert decoded == oracles.decode(code, scale, zero)


@quick
@given(values=st.lists(finite, min_size=1, max_size=12), bits=st.integers(2, 8), sym=st.booleans())
def test_zero_is_always_on_the_grid(values: list[float], bits: int, sym: bool) -> None:
    scale, zero = fit_minmax(torch.tensor([values]), bits, sym)
    grid = Grid(scale.half().view(1, 1), None if sym else zero.to(torch.uint8).view(1, 1), bits, 1)
    assert grid.decode(grid.encode(torch.zeros(1, 1))).item() == 0.0


@pytest.mark.parametrize("sym", [False, True])
def test_a_scale_never_rounds_to_zero(sym: bool) -> None:
    scale, zero = fit_minmax(torch.tensor([[0.0, 0.0], [1e-30, -1e-30]]), 4, sym)
    assert scale.tolist() == [SMALLEST_SCALE, SMALLEST_SCALE]
    assert zero.tolist() == ([8, 8] if sym else [0, 0])


def test_the_largest_scale_is_accepted_and_the_next_refused() -> None:
    low, high = torch.zeros(1), torch.tensor([LARGEST_SCALE * 3])
    assert fit_whole(low, high, 2, sym=False)[0].item() == LARGEST_SCALE
    with pytest.raises(SolverError, match=r"scale of 6\.\d+e\+04.*16 bit"):
        fit_whole(low, torch.nextafter(high, torch.tensor(math.inf)) + 100, 2, sym=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("sym", [False, True])
def test_ranges_without_a_finite_scale_are_refused(value: float, sym: bool) -> None:
    with pytest.raises(SolverError, match="float16"):
        fit_minmax(torch.tensor([[-1.0, value, 1.0]]), 4, sym)


def test_fractional_grid_by_hand() -> None:
    low, high = torch.tensor([-1.0, 2.0, -3.0]), torch.tensor([0.5, 5.0, -1.5])
    scale, zero = fit_fractional(low, high, 2, 1e9)
    assert scale.tolist() == [0.5, 1.0, 0.5]
    assert zero.tolist() == [2.0, -2.0, 6.0]


@quick
@given(ends=st.tuples(finite, finite), bits=st.integers(2, 8))
def test_fractional_grid_reaches_from_end_to_end(ends: tuple[float, float], bits: int) -> None:
    low, high = sorted(ends)
    scale, zero = fit_fractional(torch.tensor([low]), torch.tensor([high]), bits, 64.0)
    first, last = (scale * (code - zero) for code in (0, 2**bits - 1))
    slack = 1e-5 * max(abs(low), abs(high)) + SMALLEST_SCALE * 2**bits
    if high - low > max(abs(low), abs(high)) / 64:
        assert first.item() == pytest.approx(low, abs=slack)
        assert last.item() == pytest.approx(high, abs=slack)
    else:
        assert first.item() == pytest.approx(min(low, 0), abs=slack)
        assert last.item() == pytest.approx(max(high, 0), abs=slack)
    # No zero point is larger than float16 holds, whatever the range.
    assert abs(zero.item()) <= 64 * (2**bits - 1)


def test_a_range_of_one_value_loses_nothing() -> None:
    values = torch.tensor([0.3, -0.3, 0.0, 1e-30])
    scale, zero = fit_fractional(values, values, 3, 8.0)
    codes = (values / scale + zero).round()
    assert codes.tolist() == [7.0, 0.0, 0.0, 0.0]
    assert (scale * (codes - zero)).tolist() == pytest.approx(values.tolist(), rel=1e-6, abs=1e-8)


def second_level(groups: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Statistics ``[groups, rows]`` like scales of real weights."""
    generator = torch.Generator().manual_seed(seed)
    return 0.01 + 0.02 * torch.rand(groups, rows, generator=generator)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tile", [1, 5, 16, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_statistics_equal_the_textbook(sign: int, tile: int, bits: int) -> None:
    values = second_level(3, 33) * 10 * sign
    fitted = fit_statistic(values, bits, tile)
    assert fitted.codes.dtype == torch.uint8
    assert fitted.codes.shape == (3, 33)
    tiles = -(-33 // tile)
    for stored in (fitted.grid.scale, fitted.grid.zero_point):
        assert isinstance(stored, torch.Tensor)
        assert (stored.dtype, stored.shape) == (torch.float16, (3, tiles))
    codes, decoded = [], []
    for group in values.double().tolist():
        for start in range(0, 33, tile):
            one = oracles.second_level(group[start : start + tile], bits)
            codes += one[0]
            decoded += one[1]
    assert np.mean(fitted.codes.flatten().numpy() != codes) <= 0.02  # ties
    assert fitted.values().T.flatten().tolist() == pytest.approx(decoded, rel=2e-2)
    step = (values.amax() - values.amin()).item() / (2**bits - 1)
    assert (fitted.values().T - values).abs().max() <= 0.51 * step + 0.3 * 2.0**-10


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("value", [0.0057, -3.7, 1.0, 7 * 2.0**-24, 6e4])
def test_equal_statistics_are_exact_to_float16(value: float, bits: int) -> None:
    for spread in (0.0, 2.0**-12):
        values = torch.full((2, 16), value) * (1 + spread * torch.linspace(-1, 1, 16))
        found = fit_statistic(values, bits, 16).values()
        assert found == pytest.approx(torch.full((16, 2), value), rel=2.0**-10)
    assert not fit_statistic(torch.zeros(2, 16), bits, 16).values().any()


@quick
@given(
    middle=st.floats(-3.0, 3.0).map(lambda exponent: 10.0**exponent),
    width=st.floats(-7.0, 1.0).map(lambda exponent: 10.0**exponent),
    scale=st.sampled_from([1e-12, 1e-8, 1e-6, 1e-4, 1.0]),
    sign=st.sampled_from([1.0, -1.0]),
    bits=st.integers(2, 8),
)
def test_any_finite_statistics_are_held(
    middle: float, width: float, scale: float, sign: float, bits: int
) -> None:
    values = second_level(1, 16).sub(0.02).mul(100 * width).add(1).mul(middle * scale * sign)
    error = (fit_statistic(values, bits, 16).values().T - values).abs().max()
    reach, span = values.abs().max(), values.max() - values.min()
    # Half a step of the codes, the precision of float16, and its smallest number.
    assert error <= 0.51 * span / (2**bits - 1) + reach * 2.0**-10 + SMALLEST_SCALE


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 7e6])
def test_statistics_that_float16_does_not_hold_are_refused(value: float) -> None:
    values = second_level(1, 16)
    values[0, 3] = value
    with pytest.raises(SolverError, match="float16"):
        fit_statistic(values, 4, 16)


def two_level_grid() -> Grid:
    scale, zero = second_level(2, 5), second_level(2, 5, seed=1) * 200
    return Grid(fit_statistic(scale, 4, 2), fit_statistic(zero, 3, 5), 3, 4)


def test_a_statistic_by_hand() -> None:
    # Two groups of inputs, three outputs in runs of two.
    step = torch.tensor([[0.5, 1.0], [2.0, 0.25]], dtype=torch.float16)
    zero = torch.tensor([[-1.0, 0.5], [0.0, 2.0]], dtype=torch.float16)
    codes = torch.tensor([[0, 3, 2], [1, 2, 3]], dtype=torch.uint8)
    scales = Statistic(codes, Grid(step, zero, 2, 2))
    assert scales.values().tolist() == [[0.5, 2.0], [2.0, 4.0], [1.5, 0.25]]
    grid = Grid(scales, torch.tensor([[0, 1], [1, 0], [2, 2]], dtype=torch.uint8), 2, 1)
    decoded = grid.decode(torch.tensor([[3, 3], [0, 1], [2, 3]], dtype=torch.uint8))
    assert decoded.tolist() == [[1.5, 4.0], [-2.0, 4.0], [0.0, 0.25]]


def test_decoding_subtracts_in_float32_then_multiplies() -> None:
    # 2049 is no float16; its product with a step of 24 digits needs a second rounding.
    scale, zero = torch.tensor([[1 / 3]]), torch.tensor([[-2048.3]])
    expected = np.float32(np.float32(1 / 3) * np.float32(np.float32(5) - np.float32(-2048.3)))
    decoded = Grid(scale, zero, 4, 1).decode(torch.tensor([[5]], dtype=torch.uint8))
    assert decoded.item() == expected


@pytest.mark.parametrize("chosen", [[], [4], [3, 0, 3]])
def test_rows_of_a_two_level_grid_decode_alike(chosen: list[int]) -> None:
    grid, rows = two_level_grid(), torch.tensor(chosen, dtype=torch.int64)
    codes = torch.arange(40, dtype=torch.uint8).view(5, 8) % 8
    part = grid.rows(rows)
    assert torch.equal(part.decode(codes[rows]), grid.decode(codes)[rows])


def test_a_grid_along_outputs_is_that_of_the_transposed_matrix() -> None:
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    grid = two_level_grid()
    rows = replace(grid, group_size=4)
    columns = replace(rows, axis="out")
    codes = columns.encode(weight)
    assert torch.equal(codes, rows.encode(weight.T).T)
    decoded = columns.decode(codes)
    assert torch.equal(decoded, rows.decode(codes.T).T)
    assert codes.is_contiguous()
    assert decoded.is_contiguous()


@pytest.mark.parametrize("chosen", [[], [7], [3, 0, 3, 6]])
def test_rows_of_a_grid_along_outputs_decode_alike(chosen: list[int]) -> None:
    grid = replace(two_level_grid(), axis="out")
    codes = torch.arange(40, dtype=torch.uint8).view(8, 5) % 8
    rows = torch.tensor(chosen, dtype=torch.int64)
    assert torch.equal(grid.rows(rows).decode(codes[rows]), grid.decode(codes)[rows])
