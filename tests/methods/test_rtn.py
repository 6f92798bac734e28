"""Round to nearest: equal to the textbook, and never farther than half a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from quantine.core.spec import QuantSpec
from quantine.errors import PlanError
from quantine.methods.rtn import RTN
from samples import quick, random_weight

HALF_ROUNDING = 2.0**-11
"""Relative change of a scale when it is rounded to a normal float16."""
SUBNORMAL_ROUNDING = 2.0**-25
"""Absolute change of a scale when it is rounded to a subnormal float16."""


def farthest_allowed(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Half a step, and what the rounded scale takes from the ends of the range."""
    step = scale.double() / 2
    ends = weight.double().abs().amax(-1, keepdim=True) * 2 * HALF_ROUNDING
    return step + ends + 2**bits * SUBNORMAL_ROUNDING


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [1, 5, 20, -1])
def test_equals_the_textbook(bits: int, sym: bool, group_size: int) -> None:
    weight = random_weight(7, 40)
    solved = RTN()(weight, None, QuantSpec(bits, group_size, sym))
    length = 40 if group_size == -1 else group_size
    expected = oracles.rtn(weight.double().numpy(), bits, length, sym)
    assert np.array_equal(solved.codes.numpy(), expected.codes)
    assert np.array_equal(solved.dequantize().double().numpy(), expected.values)


@quick
@given(
    values=st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=16),
    bits=st.integers(2, 8),
    sym=st.booleans(),
)
def test_no_weight_moves_farther_than_half_a_step(
    values: list[float], bits: int, sym: bool
) -> None:
    weight = torch.tensor([values])
    solved = RTN()(weight, None, QuantSpec(bits, -1, sym))
    moved = (solved.dequantize().double() - weight.double()).abs()
    assert bool((moved <= farthest_allowed(weight, solved.grid.scale, bits)).all())


def test_the_bound_is_tight() -> None:
    # Some weight of a large matrix does move by nearly half a step.
    weight = random_weight(4, 512)
    solved = RTN()(weight, None, QuantSpec(3, -1))
    moved = (solved.dequantize() - weight).abs().amax(-1, keepdim=True)
    assert bool((moved >= 0.49 * solved.grid.scale.float()).all())


def test_no_better_code_exists() -> None:
    weight = random_weight(5, 24)
    solved = RTN()(weight, None, QuantSpec(3, 8))
    moved = (solved.dequantize() - weight).abs()
    for code in range(8):
        other = solved.grid.decode(torch.full_like(solved.codes, code))
        assert bool((moved <= (other - weight).abs()).all())


def test_unknown_clip_is_refused() -> None:
    with pytest.raises(PlanError, match="clip must be one of minmax, mse, not 'max'"):
        RTN(clip="max")  # type: ignore[arg-type]
