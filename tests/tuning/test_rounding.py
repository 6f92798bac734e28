"""Grids of activations that gradients reach: what they round to, and what the gradients are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.activations.grids import StaticGrid
from quantine.core.fit_range import fit_activations, fit_activations_around_zero
from quantine.kernels.integer.token_factors import LARGEST, steepness
from quantine.rptq.feedback import feedback_of
from quantine.tuning.rounding import NEAREST, TunedGrid

HEADS, DIM, TOKENS = 2, 8, 24
CHANNELS = HEADS * DIM


def values_of(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    loud = torch.rand(CHANNELS, generator=generator) * 3
    return torch.randn(2, TOKENS, CHANNELS, generator=generator) * loud.exp()


def grid_of(x: Tensor, bits: int, kind: str, share: float) -> StaticGrid:
    """A grid of two channels a cluster, or of one in heads, that covers ``share`` of the range."""
    fed, heads = kind in ("feedback", "uneven"), kind == "heads"
    labels = torch.arange(CHANNELS, dtype=torch.int32) // (1 if fed else 2)
    low, high = (x.flatten(0, 1).amin(0) * share, x.flatten(0, 1).amax(0) * share)
    if not fed:
        low, high = low.view(-1, 2).amin(1), high.view(-1, 2).amax(1)
    fit = fit_activations_around_zero if kind in ("factors", "heads") else fit_activations
    scale, zero = fit(low, high, bits)
    feedback = None
    if fed:
        met = torch.randn(HEADS, 64, DIM, generator=torch.Generator().manual_seed(1))
        met = met @ torch.linspace(-1, 2, DIM * DIM).view(DIM, DIM)
        feedback = feedback_of(met.transpose(1, 2) @ met)
        zero = zero + 0.25
    reach = torch.tensor([0.85]) if kind == "factors" else None
    head_reach = torch.tensor([0.85, 0.6]) if heads else None
    widths = None
    if kind == "uneven":
        widths = torch.tensor([0, 2, 8, 4, 2, 6, 4, 6] * HEADS, dtype=torch.uint8)
        scale = (scale * (2**bits - 1)) / (2.0 ** widths.float().clamp(min=1) - 1)
    return StaticGrid(bits, scale, zero, labels, feedback, reach, head_reach, widths)


def held(grid: StaticGrid, leaves: dict[str, Tensor], x: Tensor) -> Tensor:
    """What ``grid`` makes of ``x`` where every value stays off by as many steps as it is.

    Values beyond the ends of the grid are at these. Written out channel by channel, so that plain
    differentiation gives the gradients.
    """
    labels, feedback = grid.get_buffer("labels").long(), grid.fed()
    widths = torch.full_like(labels, grid.bits) if grid.uneven() is None else grid.uneven()[labels]
    scale, zero = leaves["scale"][labels], leaves.get("zero", grid.zero)[labels]
    step = scale.expand(x.shape)
    if "reach" in leaves:
        above, below = steepness(scale, zero, grid.bits, leaves["reach"])
        asked = torch.maximum(x.detach() * above, x.detach() * below).amax(-1, keepdim=True)
        step = scale * asked.clamp(max=LARGEST)
    if "head_reach" in leaves:
        reach = leaves["head_reach"].repeat_interleave(DIM)
        above, below = steepness(scale, zero, grid.bits, reach)
        asked = torch.maximum(x.detach() * above, x.detach() * below)
        most = asked.unflatten(-1, (HEADS, DIM)).amax(-1, keepdim=True).clamp(max=LARGEST)
        most = most + (most.half() - most).detach()  # as caches hold it
        step = scale * most.expand(*most.shape[:-1], DIM).flatten(-2)
    rest, found = list(x.unbind(-1)), []
    for channel in range(CHANNELS):
        own, size, middle = rest[channel], step[..., channel], zero[channel]
        wanted = (own / size + middle).detach()
        code = wanted.round().clamp(0, 2 ** int(widths[channel]) - 1)
        inside = own + (code - wanted) * size
        beyond = (code - wanted).abs() > (NEAREST if widths[channel] else -1.0)
        found.append(torch.where(beyond, (code - middle) * size, inside))
        if feedback is not None:
            head, place = divmod(channel, DIM)
            for later in range(place + 1, DIM):
                passed = float(feedback[head, place, later])
                rest[head * DIM + later] = rest[head * DIM + later] + passed * (found[-1] - own)
    return torch.stack(found, -1)


@pytest.mark.parametrize("kind", ["plain", "feedback", "factors", "heads", "uneven"])
@given(seed=st.integers(0, 2**31 - 1), bits=st.integers(2, 8), share=st.floats(0.3, 1.2))
def test_it_rounds_as_the_grid_does(kind: str, seed: int, bits: int, share: float) -> None:
    x = values_of(seed)
    grid = grid_of(x, bits, kind, share)
    expected = grid(x)
    assert torch.equal(TunedGrid(grid, kind in ("feedback", "uneven"))(x), expected)


def test_one_scale_beside_factors_of_tokens_is_not_tuned() -> None:
    grid = grid_of(values_of(0), 4, "factors", 1.0)
    labels = torch.zeros(CHANNELS, dtype=torch.int32)
    one = StaticGrid(4, grid.scale[:1], grid.zero[:1], labels, None, grid.reached())
    assert [name for name, _ in TunedGrid(one, False).named_parameters()] == ["reach"]
    assert torch.equal(TunedGrid(one, False)(values_of(1)), one(values_of(1)))


@pytest.mark.parametrize("kind", ["plain", "feedback", "factors", "heads", "uneven"])
@given(seed=st.integers(0, 2**31 - 1), bits=st.integers(2, 8), share=st.floats(0.3, 1.2))
def test_gradients_are_those_of_values_that_stay_as_far_off(
    kind: str, seed: int, bits: int, share: float
) -> None:
    x = values_of(seed)
    if kind in ("feedback", "uneven"):  # what a clipped value passes on is not in the gradients
        bits, share = max(bits, 6), 4.0
    grid = grid_of(x, bits, kind, share)
    if kind == "uneven":
        grid.feedback = None
    tuned = TunedGrid(grid, kind != "factors")
    leaves = {name: leaf.requires_grad_() for name, leaf in tuned.named_parameters()}
    second = {"factors": "reach", "heads": "head_reach"}.get(kind, "zero")
    assert set(leaves) == {"scale", second}
    x = x.requires_grad_()
    wanted, towards = held(grid, leaves, x), torch.randn_like(x)
    expected = torch.autograd.grad(wanted, [x, *leaves.values()], towards)
    found = torch.autograd.grad(tuned(x), [x, *leaves.values()], towards)
    for one, other in zip(found, expected, strict=True):
        # Sums of terms that nearly cancel, where factors are rounded to float16.
        near = (2e-2 if kind == "heads" else 2e-3) * float(one.abs().max())
        torch.testing.assert_close(one, other, rtol=2e-3, atol=near + 1e-6)
