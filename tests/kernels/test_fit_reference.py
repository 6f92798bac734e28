"""The search of ranges and of codes of statistics, against the same written as loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oracles
from quantine.core.grid import Grid, Statistic
from quantine.core.spec import QuantSpec
from quantine.kernels import fit as kernel
from quantine.kernels.fit import grid_cost as cost
from quantine.kernels.fit.grid_cost import DATA_FREE_CLIPS, Clip, GridCost
from quantine.kernels.fit.reference import fit_groups_reference
from samples import random_weight

FitGroups = Callable[[Tensor, Tensor, QuantSpec, GridCost], Grid]
each = pytest.mark.parametrize("fit_groups", [fit_groups_reference, kernel.fit_groups])
"""The reference, and what solvers call."""

SHARES = [1 - 0.025 * step for step in range(21)]


def loss(values: list[float], scale: float, zero: int, bits: int) -> float:
    """Sum of ``|error| ** 2.4``."""
    decoded = [oracles.decode(oracles.encode(v, scale, zero, bits), scale, zero) for v in values]
    return sum(abs(d - v) ** 2.4 for d, v in zip(decoded, values, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@each
def test_the_least_error_of_all_candidates_is_found(
    fit_groups: FitGroups, bits: int, sym: bool
) -> None:
    weight = random_weight(4, 48)
    weight[0, 3] = 0.4  # one weight far out
    grid = fit_groups(
        weight.T.unflatten(0, (-1, 24)),
        torch.ones(2, 24),
        QuantSpec(bits, 24, sym),
        GridCost("mse"),
    )
    for group, scale, zero in zip(
        weight.view(8, 24).tolist(), grid.scales().flatten(), grid.zeros().flatten(), strict=True
    ):
        candidates = [
            oracles.fit_whole(min(group) * share, max(group) * share, bits, sym) for share in SHARES
        ]
        least = min(loss(group, *candidate, bits) for candidate in candidates)
        assert loss(group, scale.item(), int(zero), bits) == pytest.approx(least, rel=1e-4)


@each
def test_a_far_out_weight_is_clipped_and_the_rest_gains(fit_groups: FitGroups) -> None:
    row = random_weight(1, 512)
    row[0, 5] = 0.3
    spec, error = QuantSpec(3, 512), {}
    for choice in DATA_FREE_CLIPS:
        grid = fit_groups(row.T.unsqueeze(0), torch.ones(1, 512), spec, GridCost(choice))
        error[choice] = (grid.decode(grid.encode(row)) - row).abs()
    others = torch.arange(512) != 5
    assert error["mse"][..., 5] > error["minmax"][..., 5]
    assert error["mse"][..., others].mean() < 0.8 * error["minmax"][..., others].mean()


@pytest.mark.parametrize("spec", [QuantSpec(4, 16), QuantSpec(3, 16, scale_bits=3)])
def test_chunks_do_not_change_the_result(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = random_weight(9, 32).T.unflatten(0, (-1, 16))
    spread = torch.ones(2, 16)
    whole = fit_groups_reference(columns, spread, spec, GridCost("mse"))
    monkeypatch.setattr(cost, "CHUNK", 70)  # two rows at a time, and a last single one
    parts = fit_groups_reference(columns, spread, spec, GridCost("mse"))
    assert torch.equal(whole.scales(), parts.scales())
    assert torch.equal(whole.zeros(), parts.zeros())


def squared_loss(values: list[float], spread: list[float], scale: float, zero: float) -> float:
    """Sum of ``error**2 / d**2`` with 3-bit codes."""
    return oracles.rounding_loss(values, [d * d for d in spread], scale, zero, 3)


@pytest.mark.parametrize("price", [math.inf, 0.002])
def test_the_hessian_cost_weighs_inputs_and_stops_at_the_price(price: float) -> None:
    weight, spread = random_weight(5, 12), torch.linspace(0.1, 2.0, 12)
    steps = [0.02, 0.03, 0.05, 0.08]
    scales = torch.tensor(steps).view(4, 1, 1).expand(4, 1, 5)
    zeros = torch.full((4, 1, 5), 3.0)
    best = GridCost("hessian", price).cheapest(
        weight.T.unsqueeze(0), spread.unsqueeze(0), scales, zeros, 3
    )
    for row, found in zip(weight.double().tolist(), best[0].tolist(), strict=True):
        costs = [
            sum(
                min(squared_loss([value], [d], step, 3.0), price)
                for value, d in zip(row, spread.tolist(), strict=True)
            )
            for step in steps
        ]
        assert costs[found] == pytest.approx(min(costs), rel=1e-5)


@each
def test_the_hessian_cost_gives_a_heavy_input_the_finer_rounding(fit_groups: FitGroups) -> None:
    weight, spread = random_weight(64, 16), torch.ones(1, 16)
    spread[0, 4] = 0.05  # errors of this input count 400 times
    error = {}
    clips: tuple[Clip, ...] = ("mse", "hessian")
    for clip in clips:
        grid = fit_groups(weight.T.unsqueeze(0), spread, QuantSpec(3, 16), GridCost(clip))
        error[clip] = (grid.decode(grid.encode(weight)) - weight).square().mean(0)
    assert error["hessian"][4] < 0.5 * error["mse"][4]
    assert error["hessian"].sum() > error["mse"].sum()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(3, 12, scale_bits=3, stat_group_size=4),
        QuantSpec(3, 12, True, scale_bits=2, stat_group_size=-1),
        QuantSpec(3, 12, scale_bits=3, zero_bits=3, stat_group_size=8),
        QuantSpec(3, 12, zero_bits=2),
    ],
)
@each
def test_no_neighbouring_codes_of_statistics_are_better(
    fit_groups: FitGroups, spec: QuantSpec
) -> None:
    weight = random_weight(10, 12)
    columns, spread = weight.T.unsqueeze(0), torch.linspace(0.3, 1.0, 12).unsqueeze(0)
    plain = fit_groups(columns, spread, spec, GridCost("minmax"))
    searched = fit_groups(columns, spread, spec, GridCost("hessian"))
    # From the codes of the searched range, not of the whole one: never worse than those either.
    losses = {
        name: [
            squared_loss(row, spread[0].tolist(), max(scale, 1e-9), zero)
            for row, scale, zero in zip(
                weight.tolist(),
                grid.scales()[:, 0].tolist(),
                grid.zeros()[:, 0].tolist(),
                strict=True,
            )
        ]
        for name, grid in (("plain", plain), ("searched", searched))
    }
    assert sum(losses["searched"]) < sum(losses["plain"])
    for stored in (searched.scale, searched.zero_point):
        if isinstance(stored, Statistic):
            assert int(stored.codes.max()) < 2**stored.grid.bits
    zero = searched.zero_point
    if isinstance(zero, torch.Tensor) and zero.dtype == torch.uint8:
        assert int(zero.max()) < 8


@pytest.mark.parametrize("clip", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("scale_bits", [3, 4, 8, 16])
@pytest.mark.parametrize("zero_bits", [0, 3, 8, 16])
@pytest.mark.parametrize("offset", [10.0, 1000.0, -1000.0])
@each
def test_groups_far_from_zero_lose_no_more_than_their_spread(
    fit_groups: FitGroups, offset: float, zero_bits: int, scale_bits: int, clip: Clip
) -> None:
    # In units of the standard deviation. The published code loses 32 times the spread.
    weight = (random_weight(32, 64) / 0.05 + offset) * 0.01
    columns = weight.T.unflatten(0, (-1, 16))
    spec = QuantSpec(3, 16, scale_bits=scale_bits, zero_bits=zero_bits)
    grid = fit_groups(columns, torch.ones(4, 16), spec, GridCost(clip))
    error = (grid.decode(grid.encode(weight)) - weight).abs().view(32, 4, 16).amax(2)
    span = (columns.amax(1) - columns.amin(1)).T
    assert bool((error <= span + 2.0**-10 * weight.abs().max()).all())


@pytest.mark.parametrize("zero_bits", [0, 3, 16])
@each
def test_a_tile_may_mix_groups_far_and_near(fit_groups: FitGroups, zero_bits: int) -> None:
    # Far groups need coarse scales, but what they need must not move near groups far away.
    weight = random_weight(16, 16)
    weight[::2] += 0.5
    spec = QuantSpec(3, 16, scale_bits=3, zero_bits=zero_bits)
    grid = fit_groups(weight.T.unsqueeze(0), torch.ones(1, 16), spec, GridCost("minmax"))
    error = (grid.decode(grid.encode(weight)) - weight).abs().amax(1)
    span = weight.amax(1) - weight.amin(1)
    assert bool((error <= span).all())
