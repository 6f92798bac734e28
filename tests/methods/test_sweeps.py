"""Codes that are chosen once more: never worse, mostly better, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine import Plan, Scheme
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import CLUSTERS, QuantSpec
from quantine.errors import PlanError
from quantine.methods.gptq import GPTQ
from quantine.methods.spqr import SpQR
from quantine.methods.sweeps import TOGETHER, swept
from quantine.statistics.hessian import Hessian
from quantine.statistics.inverse_factor import InverseFactor
from quantine.statistics.output_covariance import OutputCovariance
from samples import correlated_inputs, generator, observed, quick, random_weight

ROWS, COLUMNS = 24, 96
SOLVERS: dict[str, tuple[GPTQ | SpQR, QuantSpec]] = {
    "static": (GPTQ(), QuantSpec(3, 16)),
    "free order": (GPTQ(groups="refit"), QuantSpec(3, 16)),
    "order of inputs": (GPTQ(act_order=False, groups="aligned"), QuantSpec(2, 32, sym=True)),
    "whole rows": (GPTQ(), QuantSpec(4, -1)),
    "outputs": (GPTQ(), QuantSpec(3, 8, group_axis="out")),
    "clusters": (GPTQ(), QuantSpec(3, CLUSTERS, cluster_sizes=(20, 60, 16))),
    "8 bits": (GPTQ(), QuantSpec(8, 16)),
    "signed": (GPTQ(), QuantSpec(4, 32, sym=True, signed=True)),
    "minima": (GPTQ(), QuantSpec(4, 32, zero_bits=16, minimum=True)),
    "outliers, free order": (SpQR(threshold=0.2, groups="refit"), QuantSpec(3, 16)),
    "outliers": (SpQR(threshold=0.2), QuantSpec(3, 16, scale_bits=3, stat_group_size=8)),
    "outliers, outputs": (
        SpQR(threshold=0.2),
        QuantSpec(3, 8, scale_bits=4, stat_group_size=16, group_axis="out"),
    ),
}


def energy(found: QTensor, weight: Tensor, factor: InverseFactor, hessian: Tensor) -> float:
    """``tr(G dW H dW.T)`` in float64, from the definition of each."""
    diagonal = hessian.double().diagonal()
    damped = hessian.double() / diagonal.mean()
    damped += torch.diag(torch.where(diagonal == 0, 1 + factor.damp, factor.damp))
    error = (found.dequantize() - weight).double()
    acting = torch.eye(len(weight), dtype=torch.float64)
    if factor.coupling is not None:
        run, acting = factor.coupling.shape[1], torch.zeros_like(acting)
        for first in range(0, len(weight), run):
            own = factor.coupling[first : first + run].double()
            own = own[:, : len(own)]
            lower = own.tril(-1) + torch.eye(len(own))
            part = slice(first, first + run)
            acting[part, part] = lower @ torch.diag(own.diagonal()) @ lower.T
    return float(((acting @ error @ damped) * error).sum())


def coupling_of(rows: int, run: int, seed: int = 0) -> Tensor:
    """How rows make up for each other, in runs of ``run``."""
    few = torch.randn(60, 3, generator=generator(seed))
    parts = []
    for _ in range(-(-rows // run)):
        seen = OutputCovariance()
        seen.update(few @ torch.randn(3, run, generator=generator(seed + 1)))
        parts.append(seen.coupling())
    return torch.cat(parts)[:rows].contiguous()


def solved(
    kind: str, rows: int, columns: int, seed: int, run: int | None = None
) -> tuple[QTensor, Tensor, Hessian, InverseFactor]:
    """A matrix as the column loop leaves it, and what it was solved from."""
    solver, spec = SOLVERS[kind]
    weight = random_weight(rows, columns, seed)
    weight[3, 5] = 0.6
    hessian = observed(correlated_inputs(columns, 200, seed))
    hessian.coupling = None if run is None else coupling_of(rows, run, seed)
    found = solver(weight, hessian, spec)
    return found, weight, hessian, solver.loop.factor(hessian, spec)


@pytest.mark.parametrize("run", [None, ROWS, 16])
@pytest.mark.parametrize("kind", SOLVERS)
def test_the_error_falls_and_nothing_but_codes_changes(kind: str, run: int | None) -> None:
    found, weight, hessian, factor = solved(kind, ROWS, COLUMNS, 0, run)
    errors = [energy(found, weight, factor, hessian.matrix)]
    for sweeps in (1, 2, 4, 8):
        again = swept(found, weight, hessian.matrix, factor, sweeps)
        errors.append(energy(again, weight, factor, hessian.matrix))
        assert again.grid is found.grid
        assert again.outliers is found.outliers
        assert again.in_perm is found.in_perm
        assert int(again.codes.max()) < 2**found.grid.bits
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < errors[0] or run == ROWS  # of which all take new codes, or none
    if found.outliers is not None:
        places = found.outliers.row_indices(), found.outliers.columns
        assert len(places[0])
        assert again.codes[places].equal(found.codes[places])


@pytest.mark.parametrize("kind", SOLVERS)
def test_it_pays_on_inputs_like_those_of_layers(kind: str) -> None:
    solver, spec = SOLVERS[kind]
    few = torch.randn(400, 4, generator=generator(1)) @ torch.randn(
        4, COLUMNS, generator=generator(3)
    )
    hessian = observed(torch.randn(400, COLUMNS, generator=generator(2)) + 0.3 * few)
    weight, factor = random_weight(ROWS, COLUMNS), solver.loop.factor(hessian, spec)
    found = solver(weight, hessian, spec)
    again = swept(found, weight, hessian.matrix, factor, 4)
    before, after = (energy(one, weight, factor, hessian.matrix) for one in (found, again))
    assert after < 0.99 * before


@quick
@given(
    kind=st.sampled_from(sorted(set(SOLVERS) - {"clusters"})),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    run=st.sampled_from([None, 8, 40]),
    seed=st.integers(0, 99),
)
def test_any_shape_never_becomes_worse(
    kind: str, rows: int, columns: int, run: int | None, seed: int
) -> None:
    found, weight, hessian, factor = solved(kind, 8 * rows, 32 * columns, seed, run)
    again = swept(found, weight, hessian.matrix, factor, 2)
    before, after = (energy(one, weight, factor, hessian.matrix) for one in (found, again))
    assert after <= before * (1 + 1e-5)


def test_codes_that_could_each_be_better_are_found() -> None:
    """Where columns act alone, every code is the nearest after one sweep."""
    weight, spec = random_weight(ROWS, COLUMNS), QuantSpec(3, 16)
    hessian = observed(torch.eye(COLUMNS) * torch.linspace(0.5, 2, COLUMNS))
    nearest = GPTQ()(weight, hessian, spec)
    wrong = replace(nearest, codes=nearest.codes.flip(1))
    factor = GPTQ().loop.factor(hessian, spec)
    assert swept(wrong, weight, hessian.matrix, factor, 1).codes.equal(nearest.codes)
    assert swept(nearest, weight, hessian.matrix, factor, 1).codes.equal(nearest.codes)
    assert swept(wrong, weight, hessian.matrix, factor, 0) is wrong


def test_the_others_make_up_for_an_outlier_that_stays() -> None:
    """Its value is wrong, and it is the only one that may not change."""
    few = torch.randn(300, 2, generator=generator(1)) @ torch.randn(
        2, TOGETHER, generator=generator(2)
    )
    hessian = observed(few + 0.1 * torch.randn(300, TOGETHER, generator=generator(3)))
    weight, spec = random_weight(ROWS, TOGETHER), QuantSpec(4, -1)
    found, factor = GPTQ()(weight, hessian, spec), GPTQ().loop.factor(hessian, spec)
    marks = torch.zeros_like(weight, dtype=torch.bool)
    marks[:, 4] = True
    wrong = replace(found, outliers=Csr.where(marks, weight + 0.2))
    again = swept(wrong, weight, hessian.matrix, factor, 1)
    before, after = (energy(one, weight, factor, hessian.matrix) for one in (wrong, again))
    assert after < 0.2 * before
    assert again.dequantize()[:, 4].equal(wrong.dequantize()[:, 4])


def test_inputs_that_are_never_active_are_rounded_to_nearest() -> None:
    weight, spec = random_weight(8, 32), QuantSpec(3, 16)
    inputs = correlated_inputs(32, 100)
    inputs[:, ::3] = 0
    found = GPTQ(sweeps=3)(weight, observed(inputs), spec)
    nearest = found.grid.encode(weight)
    assert found.codes[:, ::3].equal(nearest[:, ::3])
    assert not found.codes.equal(nearest)


@pytest.mark.parametrize("kind", ["static", "outliers"])
def test_small_weights_are_swept_as_their_multiples_are(kind: str) -> None:
    solver, spec = SOLVERS[kind]
    solver = replace(solver, sweeps=2)
    weight, hessian = random_weight(ROWS, COLUMNS), observed(correlated_inputs(COLUMNS, 200))
    codes = [solver(weight * 2.0**-power, hessian, spec).codes for power in (0, 60)]
    assert float((codes[0] != codes[1]).float().mean()) < 0.01
    assert not codes[0].equal(replace(solver, sweeps=0)(weight, hessian, spec).codes)
    assert not bool(solver(torch.zeros(8, COLUMNS), hessian, spec).dequantize().any())


def test_grids_of_negative_scale_are_swept_like_their_mirrors() -> None:
    found, weight, hessian, factor = solved("whole rows", ROWS, COLUMNS, 0)
    grid = found.grid
    assert isinstance(grid.scale, Tensor)
    assert isinstance(grid.zero_point, Tensor)
    turned = replace(grid, scale=-grid.scale, zero_point=15 - grid.zero_point)
    mirror = replace(found, grid=turned, codes=15 - found.codes)
    assert mirror.dequantize().equal(found.dequantize())
    again = [swept(one, weight, hessian.matrix, factor, 2) for one in (found, mirror)]
    assert again[1].dequantize().equal(again[0].dequantize())
    assert not again[0].codes.equal(found.codes)


@pytest.mark.parametrize("sweeps", [-1, 101])
@pytest.mark.parametrize("kind", [GPTQ, SpQR])
def test_other_numbers_are_refused(kind: Any, sweeps: int) -> None:
    with pytest.raises(PlanError, match=f"sweeps must be 0 to 100, not {sweeps}"):
        kind(sweeps=sweeps)


def test_a_plan_asks_for_them() -> None:
    for method in ("gptq", "spqr"):
        plan = Plan.from_dict({"rules": [{"match": "@blocks", "method": method, "sweeps": 3}]})
        scheme = plan.rules[0].scheme
        assert isinstance(scheme, Scheme)
        assert isinstance(scheme.solver, GPTQ | SpQR)
        assert scheme.solver.sweeps == 3
        assert Plan.from_dict(plan.as_dict()) == plan
        plain = Plan.from_dict({"rules": [{"match": "@blocks", "method": method}]})
        assert "sweeps" not in plain.as_dict()["rules"][0]  # as in plans from before them
    with pytest.raises(PlanError, match="sweeps"):
        Plan.from_dict({"rules": [{"match": "@blocks", "method": "rtn", "sweeps": 3}]})


def test_more_columns_than_go_together_are_needed() -> None:
    """A matrix of so few columns is solved as it was: the loop knew all there is to know."""
    weight, hessian = random_weight(ROWS, TOGETHER), observed(correlated_inputs(TOGETHER, 50))
    spec = QuantSpec(3, -1)
    plain, again = (GPTQ(sweeps=sweeps)(weight, hessian, spec) for sweeps in (0, 1))
    assert again.codes.equal(plain.codes)
