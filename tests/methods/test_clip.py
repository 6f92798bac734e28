"""The search of the clip range against the same search written as loops."""

from __future__ import annotations

import pytest
import torch

import oracles
from quantine.core.grid import decode, encode
from quantine.methods import clip
from quantine.methods.clip import fit_groups
from samples import random_weight

SHARES = [1 - 0.025 * step for step in range(21)]


def loss(values: list[float], scale: float, zero: int, bits: int) -> float:
    """Sum of ``|error| ** 2.4``."""
    decoded = [oracles.decode(oracles.encode(v, scale, zero, bits), scale, zero) for v in values]
    return sum(abs(d - v) ** 2.4 for d, v in zip(decoded, values, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_the_least_error_of_all_candidates_is_found(bits: int, sym: bool) -> None:
    groups = random_weight(4, 48).view(4, 2, 24)
    groups[0, 0, 3] = 0.4  # one weight far out
    scales, zeros = fit_groups(groups, bits, sym, "mse")
    for group, scale, zero in zip(
        groups.flatten(0, 1).tolist(), scales.flatten(), zeros.flatten(), strict=True
    ):
        candidates = [
            oracles.fit_range(min(group) * share, max(group) * share, bits, sym) for share in SHARES
        ]
        least = min(loss(group, *candidate, bits) for candidate in candidates)
        assert loss(group, scale.item(), int(zero), bits) == pytest.approx(least, rel=1e-4)


def test_a_far_out_weight_is_clipped_and_the_rest_gains() -> None:
    row = random_weight(1, 512)
    row[0, 5] = 0.3
    groups = row.view(1, 1, 512)
    error = {}
    for choice in clip.CLIPS:
        scale, zero = fit_groups(groups, 3, False, choice)
        error[choice] = (decode(encode(groups, scale, zero, 3), scale, zero) - groups).abs()
    others = torch.arange(512) != 5
    assert error["mse"][..., 5] > error["minmax"][..., 5]
    assert error["mse"][..., others].mean() < 0.8 * error["minmax"][..., others].mean()


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = random_weight(9, 32).view(9, 2, 16)
    whole = fit_groups(groups, 4, False, "mse")
    monkeypatch.setattr(clip, "CHUNK", 70)  # two rows at a time, and a last single one
    parts = fit_groups(groups, 4, False, "mse")
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
