"""Rounding of keys and values on GPUs, in Triton's interpreter: bit by bit the reference."""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE, EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantine.kernels.kv_attention.packing import pack_states as choose
from quantine.kernels.kv_attention.packing import pack_states_reference
from samples import generator

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from quantine.kernels.kv_attention.triton.packing import pack_states

UNTOUCHED = 170
"""What bytes hold that are not to be written."""


def grid_of(seed: int, heads: int, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scales of all sizes, and zero points that are not whole, as those of keys and values."""
    scale = 2.0 ** torch.randint(-10, 5, (heads, dim), generator=generator(seed))
    scale *= torch.rand(heads, dim, generator=generator(seed + 1)) + 0.5
    return scale, torch.randn(heads, dim, generator=generator(seed + 2)) * 5 + 2 ** (bits - 1)


def feedback_of(seed: int, heads: int, dim: int) -> Tensor:
    rows = torch.randn(heads, dim, dim, generator=generator(seed)) * dim**-0.5
    return rows.half()  # what is on and below the diagonal is not to be read


def check(states: Tensor, bits: int, scale: Tensor, zero: Tensor, feedback: Tensor | None) -> None:
    """Round into the middle of a larger allocation, of which nothing else may change."""
    expected = pack_states_reference(states, bits, scale, zero, feedback)
    batch, heads, tokens, row = expected.shape
    room = torch.full((batch, heads, tokens + 5, row), UNTOUCHED, dtype=torch.uint8, device=DEVICE)
    on_gpu = [None if each is None else each.to(DEVICE) for each in (states, scale, zero, feedback)]
    assert on_gpu[0] is not None
    pack_states(on_gpu[0], bits, on_gpu[1], on_gpu[2], room[:, :, 2 : tokens + 2], on_gpu[3])
    assert torch.equal(room[:, :, 2 : tokens + 2].cpu(), expected)
    around = torch.cat([room[:, :, :2], room[:, :, tokens + 2 :]], 2)
    assert bool((around == UNTOUCHED).all())


kinds = {
    "bits": st.integers(2, 8),
    "batch": st.integers(1, 2),
    "heads": st.integers(1, 2),
    "tokens": st.sampled_from([1, 2, 3, 5]),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 999),
}


@settings(max_examples=EXAMPLES)
@given(dim=st.sampled_from([1, 7, 32, 33, 64, 80, 96, 128]), **kinds)
def test_to_nearest(
    bits: int, batch: int, heads: int, tokens: int, dtype: torch.dtype, seed: int, dim: int
) -> None:
    scale, zero = grid_of(seed, heads, dim, bits)
    steps = torch.randn(batch, tokens, heads, dim, generator=generator(seed)) * 2**bits / 2
    # As projections leave them: tokens before heads. Some are in the middle of two codes.
    states = (torch.where(steps > 0, steps, steps.round() + 0.5) * scale).to(dtype).transpose(1, 2)
    check(states, bits, scale, zero, None)


@settings(max_examples=EXAMPLES)
@given(dim=st.sampled_from([1, 2, 7, 16, 33]), **kinds)
def test_with_feedback(
    bits: int, batch: int, heads: int, tokens: int, dtype: torch.dtype, seed: int, dim: int
) -> None:
    scale, zero = grid_of(seed, heads, dim, bits)
    steps = torch.randn(batch, tokens, heads, dim, generator=generator(seed)) * 2**bits / 2
    states = (steps * scale.mean()).to(dtype).transpose(1, 2)
    check(states, bits, scale, zero, feedback_of(seed, heads, dim))


@pytest.mark.parametrize("dim", [80, 128])
def test_whole_heads_with_feedback(dim: int) -> None:
    scale, zero = grid_of(dim, 1, dim, 4)
    states = torch.randn(1, 1, 3, dim, generator=generator(dim)) * 3
    check(states, 4, scale, zero, feedback_of(dim, 1, dim))


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30, float("inf")])
def test_states_of_any_size(size: float) -> None:
    scale, zero = grid_of(1, 2, 32, 3)
    signs = torch.randn(1, 2, 3, 32, generator=generator(1)).sign()
    check(signs * size, 3, scale, zero, None)


def test_no_tokens_write_nothing() -> None:
    scale, zero = grid_of(1, 2, 32, 4)
    check(torch.zeros(1, 2, 0, 32), 4, scale, zero, None)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("start", [0, 4, 6, 9, -1])
def test_places_are_read_on_the_device(start: int, tokens: int) -> None:
    scale, zero = (each.to(DEVICE) for each in grid_of(1, 2, 16, 3))
    states = torch.randn(2, 2, tokens, 16, generator=generator(1)).to(DEVICE)
    room = torch.full((2, 2, 7, 6), UNTOUCHED, dtype=torch.uint8, device=DEVICE)
    pack_states(states, 3, scale, zero, room, None, torch.tensor(start, device=DEVICE))
    expected = torch.full_like(room, UNTOUCHED)
    codes = pack_states_reference(states, 3, scale, zero)
    for number in range(tokens):  # what has no place is written nowhere
        if 0 <= start + number < 7:
            expected[:, :, start + number] = codes[:, :, number]
    assert torch.equal(room, expected)


def test_compilers_are_told_what_is_written() -> None:
    scale, zero = (each.to(DEVICE) for each in grid_of(1, 2, 16, 4))
    states = torch.randn(1, 2, 3, 16, device=DEVICE)
    packed = torch.zeros(1, 2, 3, 8, dtype=torch.uint8, device=DEVICE)
    fed = feedback_of(1, 2, 16).to(DEVICE)
    for start in (None, torch.tensor(0, device=DEVICE)):
        operands = (states, 4, scale, zero, packed, fed, start)
        outcomes = torch.library.opcheck(torch.ops.quantine.pack_states.default, operands)
        assert set(outcomes.values()) == {"SUCCESS"}


def test_programs_are_chosen_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    monkeypatch.setattr("quantine.kernels.backend.of", lambda *tensors: "triton")
    monkeypatch.setattr(
        "quantine.kernels.kv_attention.triton.packing.pack_states",
        lambda *operands: met.append(operands),
    )
    scale, zero = grid_of(1, 2, 16, 4)
    packed = torch.zeros(1, 2, 3, 8, dtype=torch.uint8)
    choose(torch.randn(1, 2, 3, 16), 4, scale, zero, packed)
    assert len(met) == 1
