"""Kernels of solvers on a device that refuses tensors of the CPU: the same results to the bit.

Every reference, and every choice of a kernel.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_matrices import CLUSTERED, INPUTS, LENGTH, ROWS, SPECS, spread_of
from torch import Tensor

from other_device import check_same
from quantine.core.grid import Grid
from quantine.core.spec import GROUP_AXES, GroupAxis, QuantSpec
from quantine.kernels import bits, columns, fit, gram
from quantine.kernels.bits.reference import pack_reference, unpack_reference
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.columns.reference import round_block_reference
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import CLIPS, Clip, GridCost
from quantine.kernels.fit.reference import fit_groups_reference
from quantine.kernels.gram.reference import add_gram_reference
from quantine.methods.gptq import GPTQ
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR
from quantine.statistics.hessian import Hessian
from samples import correlated_inputs, generator, random_weight

# Codes of a few bits.


@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("pair", [(pack_reference, unpack_reference), (bits.pack, bits.unpack)])
def test_bits(width: int, pair: Any) -> None:
    pack, unpack = pair
    codes = torch.randint(0, 2**width, (5, 13), generator=generator(1), dtype=torch.uint8)
    packed = check_same(lambda codes: pack(codes, width), codes)
    assert torch.equal(check_same(lambda packed: unpack(packed, width, 13), packed), codes)


# Grids of groups.


@pytest.mark.parametrize("of", [fit_groups_reference, fit.fit_groups])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("axis", GROUP_AXES)
@pytest.mark.parametrize("name", SPECS)
def test_fits(name: str, axis: GroupAxis, clip: Clip, of: Any) -> None:
    spec = QuantSpec(**{**vars(SPECS[name]), "group_axis": axis})
    groups = random_weight(6 * LENGTH, ROWS).unflatten(0, (-1, LENGTH))
    spread = spread_of(6 * LENGTH).unflatten(0, (-1, LENGTH))
    spread = spread if axis == "in" else spread_of(ROWS)
    for cost in (GridCost(clip), GridCost(clip, 1e-3, look_ahead=True)):
        check_same(lambda c, s, cost=cost: of(c, s, spec, cost), groups, spread)


@pytest.mark.parametrize("spec", [QuantSpec(4, LENGTH), CLUSTERED])
def test_grids_of_rows(spec: QuantSpec) -> None:
    weight, spread = random_weight(ROWS, INPUTS), spread_of(INPUTS)
    check_same(lambda w, s: fit.fit_rows(w, s, spec, GridCost("mse")), weight, spread)


def test_codes_on_second_grids_that_are_known() -> None:
    spec = SPECS["second level of both"]
    groups = random_weight(2 * LENGTH, ROWS).unflatten(0, (-1, LENGTH))
    spread, cost = spread_of(2 * LENGTH).unflatten(0, (-1, LENGTH)), GridCost("hessian")
    grid = fit_groups_reference(groups, spread, spec, cost)
    second = grid.scale.grid, grid.zero_point.grid  # type: ignore[union-attr]
    check_same(
        lambda *args: fit_groups_reference(*args[:2], spec, cost, args[2]), groups, spread, second
    )


# Sweeps.


@pytest.mark.parametrize("solver", [GPTQ(sweeps=2), SpQR(threshold=0.2, sweeps=2)])
@pytest.mark.parametrize("axis", GROUP_AXES)
@pytest.mark.parametrize("coupled", [False, True])
def test_sweeps(solver: Solver, axis: GroupAxis, coupled: bool) -> None:
    spec = QuantSpec(3, LENGTH, scale_bits=3, group_axis=axis)

    def swept(weight: Tensor, inputs: Tensor, coupling: Tensor) -> Tensor:
        seen = Hessian(weight.shape[1], add_gram_reference, weight.device)
        seen.update(inputs)
        seen.coupling = coupling if coupled else None
        return solver(weight, seen, spec).codes

    rows = 2 * LENGTH
    coupling = torch.randn(rows, rows, generator=generator(3)).tril() * 0.1
    coupling.diagonal().fill_(1.0)
    check_same(swept, random_weight(rows, INPUTS), correlated_inputs(INPUTS, 99), coupling)


# The column loop.


def known(price: float, weight: Tensor, upper: Tensor, order: Tensor) -> Columns:
    grid = fit_groups_reference(
        weight.T.unflatten(0, (-1, LENGTH)),
        weight.new_ones(INPUTS // LENGTH, LENGTH),
        SPECS["whole zero points"],
        GridCost("minmax"),
    )
    values = grid.scales().T.contiguous(), grid.zeros().T.contiguous()
    return Columns.of(weight, upper, order, 3, values, order // LENGTH, price)


def reached(price: float, weight: Tensor, upper: Tensor, order: Tensor, spec: QuantSpec) -> Columns:
    spread, cost = upper.diagonal().contiguous(), GridCost("hessian", price, True)
    if spec.group_axis == "in":
        fitted = FittedGroups.empty(INPUTS // LENGTH, ROWS, LENGTH, spec, weight.device)
        values = fitted.scale.values, fitted.zero.values
        groups = torch.arange(INPUTS, device=weight.device) // LENGTH
    else:
        runs = (weight.new_full((INPUTS, ROWS // LENGTH), value) for value in (0.01, -1.0))
        second = Grid(*runs, 3, 1) if spec.second_level else None
        fitted = FittedGroups.of_columns(INPUTS, ROWS, spec, (second, None), weight.device)
        values = weight.new_empty(1, ROWS), weight.new_empty(1, ROWS)
        groups = torch.zeros_like(order)
    at_reach = AtReach(fitted, spread, cost)
    return Columns.of(weight, upper, order, spec.bits, values, groups, price, at_reach)


@pytest.mark.parametrize("of", [round_block_reference, columns.round_block])
@pytest.mark.parametrize("price", [math.inf, 1e-4])
@pytest.mark.parametrize("kind", ["known", *SPECS, "out", "out, second level"])
def test_columns(kind: str, price: float, of: Any) -> None:
    def rounded(weight: Tensor, upper: Tensor, order: Tensor) -> list[Any]:
        if kind == "known":
            started = known(price, weight, upper, order)
        else:
            out = QuantSpec(3, LENGTH, group_axis="out")
            second = QuantSpec(3, LENGTH, scale_bits=3, stat_group_size=1, group_axis="out")
            spec = {**SPECS, "out": out, "out, second level": second}[kind]
            started = reached(price, weight, upper, order, spec)
        of(started, 0, 16)
        of(started, 16, INPUTS)
        found = started.at_reach
        grid = None if found is None else found.fitted.grid()
        if found is not None and found.fitted.given:  # room for codes of second grids is left empty
            grid = [found.fitted.scale.values, found.fitted.zero.values]
        return [started.weights, started.codes, started.errors, grid, started.kept]

    upper = torch.randn(INPUTS, INPUTS, generator=generator(2)).triu(1) * 0.1 + torch.eye(INPUTS)
    order = torch.randperm(INPUTS, generator=generator(5))
    found = check_same(rounded, random_weight(ROWS, INPUTS), upper, order)
    kept = found[-1]
    assert (kept is None) == (price == math.inf)
    assert kept is None or 0 < int(kept.sum()) < kept.numel()


# Sums of products of inputs.


@pytest.mark.parametrize("of", [add_gram_reference, gram.add_gram])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram(dtype: torch.dtype, of: Any) -> None:
    def total(x: Tensor) -> Tensor:
        result = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32)
        of(result, x)
        return result

    check_same(total, torch.randn(20, 300, generator=generator(6)).to(dtype))
