"""The column loop on GPUs, in Triton's interpreter, against the PyTorch code that defines it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gpu_device import DEVICE, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from test_columns import CPU, columns_of, copied, factor, grids, share_differing

from quantine.core.spec import FLOAT16, QuantSpec
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.columns.reference import round_block_reference
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import GridCost
from samples import generator

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from quantine.kernels.columns.triton.columns import round_block

ROUNDED_ALIKE = 0.005
"""Largest share of rows in which another order of float32 sums may tip a tie."""


@settings(max_examples=60)
@given(
    n=st.integers(1, 40),
    rows=st.sampled_from([1, 3, 31, 32, 33, 100]),
    bits=st.integers(2, 8),
    price=st.sampled_from([math.inf, 0.02, 1e-4]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_known_grids_round_alike(
    n: int, rows: int, bits: int, price: float, seed: int, data: st.DataObject
) -> None:
    weight = torch.randn(rows, n, generator=generator(seed)) * 0.1
    groups = torch.randint(0, 3, (n,), generator=generator(seed))
    expected = columns_of(weight, factor(n, seed), bits, grids(3, rows, bits, seed), groups, price)
    found = moved(copied(expected))
    cut = data.draw(st.integers(0, n))
    for start, stop in ((0, cut), (cut, n)):
        round_block(found, start, stop)
        round_block_reference(expected, start, stop)
    assert share_differing(moved(found, "cpu"), expected, n) <= max(ROUNDED_ALIKE, 1.5 / rows)


@settings(max_examples=60)
@given(
    groups=st.integers(1, 3),
    length=st.sampled_from([1, 5, 16]),
    rows=st.sampled_from([1, 3, 64]),
    scale_bits=st.sampled_from([16, 3]),
    price=st.sampled_from([math.inf, 0.01]),
    seed=st.integers(0, 10**6),
)
def test_groups_are_fitted_when_they_are_reached(
    groups: int, length: int, rows: int, scale_bits: int, price: float, seed: int
) -> None:
    inputs = groups * length
    weight = torch.randn(rows, inputs, generator=generator(seed)) * 0.1
    spec = QuantSpec(3, length, scale_bits=scale_bits)
    upper = factor(inputs, seed)

    def started(device: str) -> tuple[Columns, FittedGroups]:
        fitted = FittedGroups.empty(groups, rows, length, spec, CPU)
        at_reach = AtReach(fitted, upper.upper.diagonal().clone(), GridCost("hessian", price, True))
        values = fitted.scale.values, fitted.zero.values
        number = torch.arange(inputs) // length
        columns = moved(columns_of(weight, upper, 3, values, number, price, at_reach), device)
        # What was one tensor before it moved has to be one after.
        of_loop = columns.at_reach.fitted
        places = {"scales": of_loop.scale.values, "zeros": of_loop.zero.values}
        return replace(columns, **places), of_loop

    (found, fitted), (expected, reference) = started(DEVICE), started("cpu")
    round_block(found, 0, inputs)
    found, fitted = moved(found, "cpu"), moved(fitted, "cpu")
    round_block_reference(expected, 0, inputs)
    total = expected.errors.square().sum()
    torch.testing.assert_close(found.errors.square().sum(), total, rtol=0.05, atol=1e-6)
    if scale_bits == FLOAT16:  # one row's tie moves the second grid of all others
        alike = torch.isclose(fitted.scale.values, reference.scale.values, rtol=1e-4, atol=1e-7)
        assert float((~alike).float().mean()) <= max(ROUNDED_ALIKE, 1.5 / rows)
        assert share_differing(found, expected, inputs) <= max(ROUNDED_ALIKE, 1.5 / rows)
