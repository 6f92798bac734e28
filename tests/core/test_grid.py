"""The affine grid against hand-computed values and the textbook loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from quantine.core.grid import LARGEST_SCALE, SMALLEST_SCALE, Grid, fit_minmax, fit_range
from quantine.errors import SolverError
from samples import quick, random_weight

finite = st.floats(-1e4, 1e4, width=32)


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
    assert fit_range(low, high, 2, sym=False)[0].item() == LARGEST_SCALE
    with pytest.raises(SolverError, match=r"scale of 6\.\d+e\+04.*16 bit"):
        fit_range(low, torch.nextafter(high, torch.tensor(math.inf)) + 100, 2, sym=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("sym", [False, True])
def test_ranges_without_a_finite_scale_are_refused(value: float, sym: bool) -> None:
    with pytest.raises(SolverError, match="float16"):
        fit_minmax(torch.tensor([[-1.0, value, 1.0]]), 4, sym)
