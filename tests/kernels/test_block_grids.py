"""Grids with signed scales and free minima: what the search finds, and what it must survive."""

from __future__ import annotations

import pytest
import torch

from quantine.core.spec import QuantSpec
from quantine.errors import SolverError
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES
from quantine.kernels.fit import block_grids, fit_rows
from quantine.kernels.fit.grid_cost import GridCost
from samples import random_weight

SPECS = pytest.mark.parametrize(
    "spec", [kind.spec for kind in GRID_TYPES.values()], ids=list(GRID_TYPES)
)


def errors(weight: torch.Tensor, spread: torch.Tensor, spec: QuantSpec, clip: str) -> float:
    grid = fit_rows(weight, spread, spec, GridCost(clip))  # type: ignore[arg-type]
    difference = grid.decode(grid.encode(weight)) - weight
    return float((difference / spread).square().sum())


@SPECS
def test_a_search_is_no_worse_than_the_whole_range(spec: QuantSpec) -> None:
    weight, spread = random_weight(20, 512), torch.rand(512) + 0.2
    assert errors(weight, spread, spec, "hessian") <= errors(weight, spread, spec, "minmax")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1"])
def test_no_grid_is_much_better(name: str) -> None:
    """Compared with each of thousands of grids."""
    spec, weight = GRID_TYPES[name].spec, random_weight(16, 32)
    same = torch.ones(32)
    found = errors(weight, same, spec, "hessian")
    largest = weight.abs().amax(1, keepdim=True)
    least = torch.full((16, 1), torch.inf)
    for share in torch.linspace(0.08, 0.14, 200):
        for offset in torch.arange(8.0, 8.5) if spec.sym else torch.arange(4.0, 11.0, 0.1):
            for sign in (1, -1):
                scale = largest * share * sign
                codes = (weight / scale + offset).round().clamp(0, 15)
                error = ((codes - offset) * scale - weight).square().sum(1, keepdim=True)
                least = torch.minimum(least, error)
    assert found < 1.1 * float(least.sum())


@SPECS
def test_extreme_weights(spec: QuantSpec) -> None:
    weight = random_weight(8, 256)
    weight[0] = 0.0
    weight[1] = 0.25
    weight[2] = -3.0
    weight[3, :16] = 1e-7
    weight[4] *= 1e-6
    weight[5, 100] = 1000.0
    weight[6] = weight[6].abs()
    weight[7, ::2] = 0.0
    grid = fit_rows(weight, torch.ones(256), spec, GridCost("mse"))
    assert bool((grid.scales() != 0).all())
    found = grid.decode(grid.encode(weight))
    assert bool(torch.isfinite(found).all())
    assert bool((found[0].abs() < 1e-6).all())
    difference = (found - weight).abs()
    assert float(difference[1].max()) <= 0.25 * 2.0**-6
    assert float(difference[2].max()) <= 3.0 * 2.0**-6
    assert float(difference[4].max()) <= float(weight[4].abs().max())
    assert float(difference[5, 100]) < 150.0


@SPECS
def test_lines_are_fitted_alone(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, same = random_weight(9, 256), torch.ones(256)
    whole = fit_rows(weight, same, spec, GridCost("mse"))
    monkeypatch.setattr(block_grids, "LINES", 600)
    parts = fit_rows(weight, same, spec, GridCost("mse"))
    codes = whole.encode(weight)
    assert torch.equal(parts.encode(weight), codes)
    assert torch.equal(parts.decode(codes), whole.decode(codes))


def test_scales_too_large_for_float16_are_refused() -> None:
    with pytest.raises(SolverError, match="does not fit into float16"):
        fit_rows(
            random_weight(2, 32) * 1e7, torch.ones(32), GRID_TYPES["Q4_0"].spec, GridCost("mse")
        )
