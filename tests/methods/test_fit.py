"""The search of the clip range against the same search written as loops."""

from __future__ import annotations

import pytest
import torch

import oracles
from quantine.core.spec import QuantSpec
from quantine.methods import fit
from quantine.methods.fit import Objective, fit_groups
from samples import random_weight

SHARES = [1 - 0.025 * step for step in range(21)]


def loss(values: list[float], scale: float, zero: int, bits: int) -> float:
    """Sum of ``|error| ** 2.4``."""
    decoded = [oracles.decode(oracles.encode(v, scale, zero, bits), scale, zero) for v in values]
    return sum(abs(d - v) ** 2.4 for d, v in zip(decoded, values, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_the_least_error_of_all_candidates_is_found(bits: int, sym: bool) -> None:
    weight = random_weight(4, 48)
    weight[0, 3] = 0.4  # one weight far out
    grid = fit_groups(weight.T.unflatten(0, (-1, 24)), QuantSpec(bits, 24, sym), Objective("mse"))
    for group, scale, zero in zip(
        weight.view(8, 24).tolist(), grid.scales().flatten(), grid.zeros().flatten(), strict=True
    ):
        candidates = [
            oracles.fit_range(min(group) * share, max(group) * share, bits, sym) for share in SHARES
        ]
        least = min(loss(group, *candidate, bits) for candidate in candidates)
        assert loss(group, scale.item(), int(zero), bits) == pytest.approx(least, rel=1e-4)


def test_a_far_out_weight_is_clipped_and_the_rest_gains() -> None:
    row = random_weight(1, 512)
    row[0, 5] = 0.3
    spec, error = QuantSpec(3, 512), {}
    for choice in fit.DATA_FREE_CLIPS:
        grid = fit_groups(row.T.unsqueeze(0), spec, Objective(choice))
        error[choice] = (grid.decode(grid.encode(row)) - row).abs()
    others = torch.arange(512) != 5
    assert error["mse"][..., 5] > error["minmax"][..., 5]
    assert error["mse"][..., others].mean() < 0.8 * error["minmax"][..., others].mean()


@pytest.mark.parametrize("spec", [QuantSpec(4, 16), QuantSpec(3, 16, scale_bits=3)])
def test_chunks_do_not_change_the_result(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = random_weight(9, 32).T.unflatten(0, (-1, 16))
    whole = fit_groups(columns, spec, Objective("mse"))
    monkeypatch.setattr(fit, "CHUNK", 70)  # two rows at a time, and a last single one
    parts = fit_groups(columns, spec, Objective("mse"))
    assert torch.equal(whole.scales(), parts.scales())
    assert torch.equal(whole.zeros(), parts.zeros())
