"""Rounding of a head's channels in turn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine.activations.grids import StaticGrid
from quantine.core.fit_range import fit_activations
from quantine.kernels.kv_attention.feedback import encode_fed
from quantine.rptq.feedback import DAMP, feedback_of


def met(heads: int, dim: int, seed: int) -> torch.Tensor:
    """Vectors ``[n, heads, dim]`` with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(heads, dim, dim, generator=generator)
    strength = torch.logspace(0, -2, dim)
    rows = torch.randn(400, heads, dim, generator=generator) * strength
    return torch.einsum("nhd,hde->nhe", rows, mixing)


def moments_of(rows: torch.Tensor) -> torch.Tensor:
    states = rows.transpose(0, 1)
    return states.transpose(1, 2) @ states


@given(st.integers(1, 6), st.integers(0, 20))
def test_each_error_is_made_up_for_as_well_as_the_channels_after_it_can(
    dim: int, seed: int
) -> None:
    moments = moments_of(met(2, dim, seed))
    found = feedback_of(moments)
    for head in range(2):
        own = moments[head].double().numpy()
        own = own / np.diag(own).mean() + DAMP * np.eye(dim)
        for channel in range(dim):
            after = slice(channel + 1, None)
            # What the others must change by to make e' H e least, where this one changes by one.
            best = -np.linalg.solve(own[after, after], own[after, channel])
            row = found[head, channel].double().numpy()
            assert not row[: channel + 1].any()
            assert row[after] == pytest.approx(best, rel=2e-3, abs=2e-3)


@given(st.integers(2, 8), st.integers(0, 20))
def test_codes_are_those_of_one_channel_after_another(bits: int, seed: int) -> None:
    heads, dim = 2, 5
    x = torch.randn(7, heads, dim, generator=torch.Generator().manual_seed(seed)) * 3
    ends = torch.full((heads, dim), -4.0), torch.linspace(3, 6, heads * dim).view(heads, dim)
    scale, zero = fit_activations(*ends, bits)
    feedback = feedback_of(moments_of(met(heads, dim, seed))).float()
    codes = encode_fed(x, scale, zero, feedback, torch.full_like(scale, 2**bits - 1))
    for token in range(7):
        for head in range(heads):
            rest = x[token, head].clone()
            for channel in range(dim):
                step, offset = scale[head, channel], zero[head, channel]
                code = (rest[channel] / step + offset).round().clamp(0, 2**bits - 1)
                assert codes[token, head, channel] == code
                rest -= (rest[channel] - (code - offset) * step) * feedback[head, channel]


def test_products_with_what_is_met_lose_less() -> None:
    heads, dim = 3, 64
    queries, other = met(heads, dim, 0), torch.Generator().manual_seed(9)
    keys = torch.randn(500, heads, dim, generator=other)
    flat = keys.flatten(1)
    labels = torch.arange(heads * dim).int()
    fitted = fit_activations(flat.amin(0), flat.amax(0), 4)
    plain = StaticGrid(4, *fitted, labels)
    fed = StaticGrid(4, *fitted, labels, feedback_of(moments_of(queries)))

    def lost(grid: StaticGrid) -> float:
        errors = (grid(flat) - flat).view(-1, heads, dim)
        return float(torch.einsum("nhd,mhd->nmh", errors, queries).square().mean())

    assert lost(fed) < 0.5 * lost(plain)
    assert torch.equal(fed(fed(flat)), fed(flat))
    assert fed.to(torch.bfloat16).get_buffer("feedback").dtype == torch.float16
    assert torch.equal(fed(keys.view(5, 100, -1)).flatten(0, 1), fed(flat))


def test_heads_that_were_never_active_are_rounded_to_nearest() -> None:
    assert not feedback_of(torch.zeros(2, 4, 4)).any()
