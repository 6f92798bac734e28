"""Keys with channels of different bits, and values with factors: what caches hold of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from uneven import uneven_widths

from quantine.core.grid import decode
from quantine.kernels import backend
from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.digits import DIGIT, Digits
from quantine.kernels.kv_attention.reference import attend_reference
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.state_codes import state_codes, state_codes_reference
from quantine.kernels.kv_attention.state_grid import StateGrid
from quantine.rptq.feedback import feedback_of


@dataclass(frozen=True)
class Case:
    grid: StateGrid
    states: Tensor


def case(kind: str, bits: int, heads: int, dim: int, tokens: int, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, heads, tokens, dim, generator=generator) * 3
    scale = torch.rand(heads, dim, generator=generator) + 0.05
    zero = torch.rand(heads, dim, generator=generator) * (2**bits - 1)
    if kind == "factors":
        states[0, 0, 0] *= 1000  # a loud token, and one of zeros
        states[0, 0, -1] = 0
        reach = torch.rand(heads, generator=generator) + 0.3
        return Case(StateGrid(bits, scale, zero, reach=reach), states)
    rows = torch.randn(heads, 50, dim, generator=generator)
    feedback = feedback_of(rows.transpose(1, 2) @ rows) if kind == "fed" else None
    widths = uneven_widths(heads, dim, bits, seed)
    return Case(StateGrid.uneven(bits, scale, zero, feedback, widths), states)


KINDS = st.sampled_from(["widths", "fed", "factors"])


@given(
    KINDS,
    st.integers(2, 7),
    st.integers(1, 3),
    st.sampled_from([1, 3, 4, 6, 7, 11, 17, 64]),
    st.sampled_from([1, 3, 70]),
    st.integers(0, 99),
)
def test_a_cache_holds_what_the_grid_rounds_to(
    kind: str, bits: int, heads: int, dim: int, tokens: int, seed: int
) -> None:
    made = case(kind, bits, heads, dim, tokens, seed)
    grid, states = made.grid, made.states
    flat = states.transpose(1, 2).reshape(-1, heads, dim)
    expected = grid.rounded(flat).view(2, tokens, heads, dim).transpose(1, 2)
    room = torch.zeros(2, heads, tokens + 2, grid.row, dtype=torch.uint8)
    grid.pack(states, room[:, :, 1:-1])
    assert not room[:, :, 0].any()
    assert not room[:, :, -1].any()
    packed = grid.states(room[:, :, 1:-1], torch.float32)
    assert packed.shape == states.shape
    assert torch.equal(packed.decoded(), expected)
    moved = torch.zeros_like(room)
    grid.pack(states, moved, torch.tensor(1))
    assert torch.equal(moved, room)
    with pytest.raises(ValueError, match="in a cache with room for"):
        grid.pack(states, moved, torch.tensor(3))
    # Half a digit may be left over.
    used = dim * bits + 16 if kind == "factors" else dim * bits // DIGIT * DIGIT
    assert grid.row == -(-used // 8)


@given(st.integers(2, 7), st.sampled_from([1, 5, 64]), st.booleans(), st.integers(0, 99))
def test_codes_are_those_of_the_reference(bits: int, dim: int, fed: bool, seed: int) -> None:
    made = case("fed" if fed else "widths", bits, 2, dim, 9, seed)
    _, scale, zero, feedback, widths, *_ = made.grid
    assert widths is not None
    codes = state_codes(made.states, scale, zero, feedback, widths)
    tops = torch.exp2(widths.float()) - 1
    assert bool((codes <= tops[:, None]).all())
    assert torch.equal(codes, state_codes_reference(made.states, scale, zero, feedback, tops))


@pytest.mark.parametrize("fed", [True, False])
@pytest.mark.parametrize("chosen", ["native", "reference"])
def test_compilers_are_told_what_operators_give(
    fed: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case("fed" if fed else "widths", 3, 2, 16, 5, 0)
    _, scale, zero, feedback, widths, *_ = made.grid
    assert widths is not None
    monkeypatch.setattr(backend, "of", lambda *_: chosen)
    transposed = made.states.transpose(1, 2).contiguous().transpose(1, 2)
    operands = (transposed, scale, zero, feedback, widths)
    torch.library.opcheck(torch.ops.quantine.state_codes, operands)
    rows, room = torch.zeros(2, 2, 3, 4, dtype=torch.uint8), torch.ones(2, 2, 9, 4).byte()
    torch.library.opcheck(torch.ops.quantine.put_rows, (rows, room, torch.tensor(2)))


def test_factors_let_loud_tokens_use_the_steps_of_quiet_ones() -> None:
    states = torch.randn(1, 2, 50, 16, generator=torch.Generator().manual_seed(0))
    states *= torch.logspace(-2, 0, 50)[:, None]
    scale, zero = torch.full((2, 16), 0.5), torch.full((2, 16), 3.5)
    grid = StateGrid(3, scale, zero, reach=torch.full((2,), 0.8))
    tokens_first = states[0].transpose(0, 1)
    rounded = grid.rounded(tokens_first)
    errors = (rounded - tokens_first).norm(dim=-1) / tokens_first.norm(dim=-1)
    assert float(errors.max()) < 0.35


@given(st.integers(2, 7), st.sampled_from([1, 2, 7, 64]), st.integers(0, 99))
def test_digits_put_codes_together_again(bits: int, dim: int, seed: int) -> None:
    widths = uneven_widths(3, dim, bits, seed)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (2, 3, 5, dim), generator=generator, dtype=torch.uint8)
    codes = torch.minimum(codes, (torch.exp2(widths.float()) - 1).byte()[:, None])
    digits = Digits.of(widths, bits * dim // DIGIT)
    split = digits.split(codes)
    assert split.shape == (2, 3, 5, bits * dim // DIGIT)
    assert int(split.max(initial=0) if split.numel() == 0 else split.max()) < 2**DIGIT
    assert torch.equal(digits.joined(split, dim), codes)


@pytest.mark.parametrize("tokens", [1, 40])
def test_attention_multiplies_what_rows_stand_for(tokens: int) -> None:
    key, value = case("fed", 3, 2, 16, 40, 1), case("factors", 3, 2, 16, 40, 2)
    held = []
    for one in (key, value):
        room = torch.zeros(2, 2, 40, one.grid.row, dtype=torch.uint8)
        one.grid.pack(one.states, room)
        held.append(one.grid.states(room, torch.float32))
    query = torch.randn(2, 4, tokens, 16, generator=torch.Generator().manual_seed(3))
    scoring = Scoring(0.25)
    found, _ = attend(query, held[0], held[1], None, scoring)
    expected, _ = attend_reference(query, held[0].decoded(), held[1].decoded(), None, scoring)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_constant_channels_take_no_bits() -> None:
    widths = torch.tensor([[0, 8, 0, 4]], dtype=torch.uint8)
    scale, zero = torch.ones(1, 4), torch.tensor([[-7.0, 0, 2, 0]])
    grid = StateGrid.uneven(3, scale, zero, None, widths)
    rounded = grid.rounded(torch.tensor([[[100.0, 200.0, 100.0, 100.0]]]))
    assert rounded.tolist() == [[[7.0, 200.0, -2.0, 15.0]]]
    assert torch.equal(decode(torch.zeros(4), scale[0], zero[0])[[0, 2]], rounded[0, 0, [0, 2]])
