"""What of a quantized matrix is tuned, and that files hold what was tuned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.plan.plan import Plan
from quantine.plan.scheme import Scheme
from quantine.tuning.matrix import TunedMatrix
from quantine.tuning.numbers import Numbers
from samples import correlated_inputs, observed, random_weight

SCHEMES = {
    "rtn": {"name": "rtn", "group_size": 32},
    "gptq": {"name": "gptq", "bits": 3, "group_size": 16},
    "symmetric": {"name": "gptq", "bits": 4, "group_size": 16, "sym": True},
    "along outputs": {"name": "gptq", "bits": 3, "group_size": 16, "group_axis": "out"},
    "spqr": {"name": "spqr", "bits": 3},
    "published": {"name": "spqr-faithful"},
}


def solved(kind: str) -> QTensor:
    scheme = Plan.preset(**SCHEMES[kind]).rules[0].scheme
    assert isinstance(scheme, Scheme)
    weight = random_weight(64, 128)
    weight[3, 5] = 4.0
    return scheme.solver(weight, observed(correlated_inputs(128, 512)), scheme.spec)


@pytest.mark.parametrize("kind", SCHEMES)
def test_at_the_beginning_a_matrix_is_what_was_solved(kind: str) -> None:
    q = solved(kind)
    tuned = TunedMatrix(q)
    assert tuned.numbers
    assert torch.equal(tuned.weight(), q.dequantize())
    again = tuned.qtensor()
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.grid.scales(), q.grid.scales())


@pytest.mark.parametrize("kind", SCHEMES)
def test_the_tuned_matrix_is_what_files_will_hold(kind: str) -> None:
    q = solved(kind)
    tuned = TunedMatrix(q)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for numbers in tuned.numbers.values():
            numbers.moved.copy_(torch.randn(numbers.moved.shape, generator=drawn) * 1e-2)
    assert not torch.equal(tuned.weight(), q.dequantize())
    stored = tuned.qtensor()
    assert torch.equal(stored.dequantize(), tuned.weight())
    assert all(n.stored().dtype == n.start.dtype for n in tuned.numbers.values())


@pytest.mark.parametrize("kind", SCHEMES)
def test_gradients_lead_a_matrix_towards_its_float_weight(kind: str) -> None:
    q = solved(kind)
    tuned = TunedMatrix(q)
    weight = random_weight(64, 128)
    leaves = [numbers.moved for numbers in tuned.numbers.values()]
    adam = torch.optim.Adam(leaves, lr=2e-3)
    first = error(tuned, weight).item()
    for _ in range(20):
        adam.zero_grad()
        error(tuned, weight).backward()
        adam.step()
    assert error(tuned, weight).item() < 0.99 * first


@pytest.mark.parametrize("kind", SCHEMES)
def test_codes_that_are_freed_follow_the_gradient_and_stay_where_they_went(kind: str) -> None:
    q = solved(kind)
    tuned = TunedMatrix(q)
    weight = random_weight(64, 128)
    wanted = weight.roll(1, 0)  # which no scale and no zero point can follow
    tuned.free_codes(weight)
    assert torch.equal(tuned.weight(), q.dequantize())
    adam = torch.optim.Adam([tuned.numbers["codes"].moved], lr=2e-2)
    for _ in range(20):
        adam.zero_grad()
        error(tuned, wanted).backward()
        adam.step()
    moved = tuned.weight().detach()
    assert error(tuned, wanted) < 0.5 * (q.dequantize() - wanted).square().sum()
    tuned.hold_codes()
    assert "codes" not in tuned.numbers
    assert torch.equal(tuned.weight(), moved)
    assert torch.equal(tuned.qtensor().dequantize(), moved)
    assert tuned.qtensor().codes.dtype == torch.uint8
    assert int(tuned.codes.max()) < 2**q.grid.bits


def test_codes_begin_nearer_to_what_they_were_rounded_from() -> None:
    q = solved("rtn")
    weight = random_weight(64, 128)
    weight[3, 5] = 4.0
    tuned = TunedMatrix(q)
    tuned.free_codes(weight)
    exact = tuned.numbers["codes"].start
    rounded_from = (weight - q.dequantize()).sign()
    assert bool((((exact - q.codes) * rounded_from) >= 0).all())
    assert float((exact - q.codes).abs().max()) <= 0.3 + 1e-6


def error(tuned: TunedMatrix, weight: Tensor) -> Tensor:
    return (tuned.weight() - weight).square().sum()


def test_integer_zero_points_and_codes_stay() -> None:
    names = set(TunedMatrix(solved("gptq")).numbers)
    assert names == {"scale"}


def test_second_grids_and_outliers_are_tuned() -> None:
    q = solved("published")
    assert q.outliers is not None
    names = set(TunedMatrix(q).numbers)
    assert {"scale.step", "scale.zero", "zero_point.step", "zero_point.zero"} <= names
    assert "outliers" in names


def test_a_matrix_without_outliers_has_none_to_tune() -> None:
    q = replace(solved("spqr"), outliers=None)
    assert "outliers" not in TunedMatrix(q).numbers


def test_vectors_of_zeros_move_by_what_is_added_to_them() -> None:
    numbers = Numbers.vector(torch.zeros(8, dtype=torch.bfloat16))
    with torch.no_grad():
        numbers.moved.fill_(0.125)
    assert numbers.now().tolist() == [0.125] * 8
