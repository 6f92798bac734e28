"""Centres of keys: what turns with positions, and what queries make of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from uneven import uneven_widths

from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.key_centre import ROOM, KeyCentre
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.reference import attend_reference
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.state_grid import StateGrid


def centre_of(heads: int, dim: int, seed: int, loud: float = 10.0) -> KeyCentre:
    """Channels turn in pairs, the last one of odd heads not at all."""
    generator = torch.Generator().manual_seed(seed)
    first, cos, sin = (torch.randn(heads, dim, generator=generator) * loud for _ in range(3))
    turns = torch.zeros(dim)
    turns[: dim // 2 * 2] = torch.logspace(0, -4, max(1, dim // 2))[: dim // 2].repeat(2)
    return KeyCentre(first, torch.stack([cos, sin]), turns)


SIZES = (st.integers(1, 3), st.sampled_from([1, 2, 7, 16, 64]), st.integers(0, 99))


@given(*SIZES, st.integers(1, 3), st.sampled_from([0, 1, 5, ROOM, ROOM + 1, 700]))
def test_products_are_those_with_the_centre_at_each_position(
    heads: int, dim: int, seed: int, copies: int, context: int
) -> None:
    centre = centre_of(heads, dim, seed)
    query = torch.randn(2, heads * copies, 3, dim, generator=torch.Generator().manual_seed(seed))
    keys = centre.at(torch.arange(context)).transpose(0, 1).repeat_interleave(copies, 0)
    expected = query @ keys.transpose(1, 2)
    for _ in range(2):  # the second time from the table
        torch.testing.assert_close(centre.products(query, context), expected, rtol=1e-4, atol=2e-3)


def test_it_turns_by_the_angle_of_each_token() -> None:
    centre = KeyCentre(
        torch.tensor([[5.0, 6.0]]),
        torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]),
        torch.tensor([0.5]),
    )
    found = centre.at(torch.tensor([[0, 1], [4, 0]]))
    half, two = torch.tensor(0.5), torch.tensor(2.0)
    assert found[0, 0].tolist() == found[1, 1].tolist() == [[5.0, 6.0]]
    torch.testing.assert_close(found[0, 1, 0], torch.stack([half.cos(), 2 * half.sin()]))
    torch.testing.assert_close(found[1, 0, 0], torch.stack([two.cos(), 2 * two.sin()]))


def test_blocks_that_turn_alike_share_a_table() -> None:
    one, same, other = centre_of(2, 8, 0), centre_of(2, 8, 1), centre_of(2, 6, 0)
    assert same.share(one)
    assert not other.share(one)
    assert same.waves() is one.waves()
    assert other.waves() is not one.waves()


def packed_keys(centre: KeyCentre, states: Tensor, bits: int, seed: int) -> PackedStates:
    heads, dim = centre.first.shape
    scale = torch.rand(heads, dim, generator=torch.Generator().manual_seed(seed)) + 0.3
    zero = torch.full((heads, dim), (2**bits - 1) / 2)
    widths = uneven_widths(heads, dim, bits, seed)
    grid = StateGrid.uneven(bits, scale, zero, None, widths)._replace(centre=centre)
    room = torch.zeros(*states.shape[:3], grid.row, dtype=torch.uint8)
    grid.pack(states, room)
    found = grid.states(room, torch.float32)
    assert isinstance(found, PackedStates)
    return found


@given(
    *SIZES,
    st.integers(1, 3),
    st.sampled_from([1, 4, 300]),
    st.sampled_from([1, 3]),
    st.sampled_from([None, "one", "each"]),
    st.sampled_from([None, 3.0]),
)
def test_attention_is_that_over_keys_with_their_centre(
    heads: int,
    dim: int,
    seed: int,
    copies: int,
    context: int,
    tokens: int,
    masks: str | None,
    softcap: float | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    centre = centre_of(heads, dim, seed, 3.0)
    states, floats = (torch.randn(2, heads, context, dim, generator=generator) for _ in range(2))
    key = packed_keys(centre, states, 3, seed)
    value_grid = StateGrid(4, torch.full((heads, dim), 0.4), torch.full((heads, dim), 7.5))
    room = torch.zeros(2, heads, context, value_grid.row, dtype=torch.uint8)
    value_grid.pack(floats, room)
    value = value_grid.states(room, torch.float32)
    query = torch.randn(2, heads * copies, tokens, dim, generator=generator)
    mask = None
    if masks is not None:
        shape = (2, heads * copies if masks == "each" else 1, tokens, context)
        mask = torch.where(torch.rand(shape, generator=generator) < 0.3, -3e38, 0.0)
        mask[..., 0] = 0
    scoring = Scoring(dim**-0.5, softcap)
    found, probabilities = attend(query, key, value, mask, scoring)
    centred = key.decoded()
    plain = PackedStates(
        key.packed, key.bits, key.scale, key.zero, key.dtype, key.rows._replace(centre=None)
    )
    added = centre.at(torch.arange(context)).transpose(0, 1)
    torch.testing.assert_close(centred, plain.decoded() + added)
    expected = attend_reference(query, centred, value.decoded(), mask, scoring)
    torch.testing.assert_close(found, expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(probabilities, expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("heads", [1, 2])
def test_products_are_in_float32_under_autocast(heads: int) -> None:
    centre, query = centre_of(heads, 16, 0), torch.randn(1, heads, 2, 16)
    expected = centre.products(query, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(centre.products(query, 9), expected)
