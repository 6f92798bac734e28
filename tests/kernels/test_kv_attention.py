"""Attention over packed keys and values: every instruction set against the PyTorch reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from uneven import uneven_widths

from quantine.kernels.bits import pack
from quantine.kernels.kv_attention import MOST_ROWS, _kind, attend
from quantine.kernels.kv_attention.digits import DIGIT, Digits
from quantine.kernels.kv_attention.packed_states import PackedStates, RowLayout
from quantine.kernels.kv_attention.reference import attend_reference, round_probabilities
from quantine.kernels.kv_attention.scoring import Scoring

widths = st.integers(2, 8)
rounding = given(
    bits=widths, softmax=st.integers(2, 8), context=st.integers(1, 300), seed=st.integers(0, 9)
)


def states(
    seed: int, bits: int, shape: tuple[int, int, int, int], room: int = 0, zero: float = 20.0
) -> PackedStates:
    """Random codes ``[batch, heads, tokens, dim]``, followed by room for ``room`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, tokens, dim = shape
    codes = torch.randint(2**bits, (batch * heads * (tokens + room), dim), generator=generator)
    packed = pack(codes.byte(), bits).view(batch, heads, tokens + room, -1)
    scale = torch.rand(heads, dim, generator=generator) * 0.2 + 0.01
    zeros = (torch.randn(heads, dim, generator=generator) * zero).round()
    return PackedStates(packed[:, :, :tokens], bits, scale, zeros, torch.float32)


def exact(query: Tensor, key: PackedStates, value: PackedStates, *args: Any) -> tuple[Tensor, ...]:
    """The reference in float64."""
    return attend_reference(query.double(), key.double(), value.double(), *args)


def uneven(seed: int, bits: int, shape: tuple[int, int, int, int], room: int = 0) -> PackedStates:
    """The same where channels have different numbers of bits."""
    _, heads, _, dim = shape
    grid = states(seed, bits, shape)
    digits = Digits.of(uneven_widths(heads, dim, bits, seed), bits * dim // DIGIT)
    codes = states(seed, DIGIT, (*shape[:3], bits * dim // DIGIT), room).packed
    return PackedStates(codes, bits, grid.scale, grid.zero, torch.float32, RowLayout(digits))


def loud(seed: int, bits: int, shape: tuple[int, int, int, int], room: int = 0) -> PackedStates:
    """The same with factors of tokens."""
    found = states(seed, bits, shape, room)
    factors = torch.rand(*shape[:3], 1, generator=torch.Generator().manual_seed(seed)) * 4
    rows = torch.cat([found.packed, factors.half().view(torch.uint8)], 3)
    whole = torch.nn.functional.pad(rows, (0, 0, 0, room))[:, :, : shape[2]]
    layout = RowLayout(factors=True)
    return PackedStates(whole, bits, found.scale, found.zero, torch.float32, layout)


KINDS = {"plain": states, "uneven": uneven, "loud": loud}


@given(
    kinds=st.sampled_from([("plain", "plain"), ("uneven", "loud"), ("plain", "loud")]),
    bits=st.tuples(widths, widths),
    batch=st.integers(1, 3),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    rows=st.integers(1, 5),
    context=st.sampled_from([1, 2, 15, 16, 17, 100, 255, 256, 257, 600]),
    dim=st.sampled_from([1, 7, 8, 16, 17, 40, 64, 80, 128]),
    room=st.sampled_from([0, 1, 30]),
    masked=st.sampled_from(["no", "all alike", "heads", "longer"]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 99),
)
@example(("plain", "plain"), (4, 3), 1, (3, 3), 1, 257, 64, 0, "no", None, 0)
@example(("plain", "plain"), (8, 8), 2, (1, 6), 5, 600, 128, 1, "heads", 5.0, 1)
@example(("uneven", "loud"), (3, 3), 2, (3, 3), 2, 600, 64, 0, "heads", 5.0, 1)
def test_it_is_attention_over_decoded_floats(
    level: str,
    kinds: tuple[str, str],
    bits: tuple[int, int],
    batch: int,
    heads: tuple[int, int],
    rows: int,
    context: int,
    dim: int,
    room: int,
    masked: str,
    softcap: float | None,
    seed: int,
) -> None:
    kv_heads, group = heads
    shape = (batch, kv_heads, context, dim)
    key = KINDS[kinds[0]](seed, bits[0], shape, room)
    value = KINDS[kinds[1]](seed + 1, bits[1], shape, room)
    query = torch.randn(batch, kv_heads * group, rows, dim) * dim**-0.5
    assert _kind(query, key, value, None) == "native"
    mask = {
        "no": None,
        "all alike": torch.zeros(1, 1, rows, context),
        "heads": torch.randn(batch, kv_heads * group, rows, context),
        "longer": torch.randn(batch, 1, 1, context + 3),
    }[masked]
    if mask is not None:
        # A padded beginning; each query sees one token at least.
        mask[..., : context // 2] = torch.finfo(torch.float32).min
    out, probabilities = attend(query, key, value, mask, Scoring(0.5, softcap))
    expected, weights = exact(query, key, value, mask, Scoring(0.5, softcap))
    # Scores are sums of products up to this, and probabilities have their errors relatively.
    largest = ((query * 0.5).abs().double() @ key.decoded().abs().double().amax((1, 2)).T).max()
    error = 3e-6 * (1 + float(largest) + (softcap or 0.0))
    atol = error * float(weights.max())
    assert torch.allclose(probabilities.double(), weights, atol=atol, rtol=0)
    reach = float(value.decoded().abs().max()) + 4 * float((value.scale * value.zero).abs().max())
    assert torch.allclose(out.double(), expected, atol=2 * error * reach, rtol=0)


@rounding
def test_probabilities_are_rounded_to_their_grid(
    level: str, bits: int, softmax: int, context: int, seed: int
) -> None:
    key, value = (states(seed, bits, (1, 2, context, 16)) for _ in range(2))
    query = torch.randn(1, 4, 1, 16)
    args = (None, Scoring(0.25, None, softmax, False))
    out, found = attend(query, key, value, *args)
    _, expected = exact(query, key, value, *args)
    top = 2**softmax - 1
    steps = found * top
    assert torch.equal(steps.round() / top, found)
    # A probability in the middle of two steps may go to either.
    assert ((found - expected).abs() * top).max() < 1.01
    assert ((found - expected).abs() > 1e-6).sum() <= 2
    mixed = found.view(1, 2, 2, context) @ value
    assert torch.allclose(out, mixed.view(1, 4, 1, 16).transpose(1, 2), atol=1e-3)


@rounding
def test_ratios_to_the_largest_probability_are_rounded(
    level: str, bits: int, softmax: int, context: int, seed: int
) -> None:
    key, value = (states(seed, bits, (1, 2, context, 16)) for _ in range(2))
    query = torch.randn(1, 4, 1, 16)
    out, found = attend(query, key, value, None, Scoring(0.25, None, softmax, True))
    _, exactly = exact(query, key, value, None, Scoring(0.25))
    assert torch.allclose(found.sum(-1), torch.ones(1, 4, 1), atol=1e-5)
    steps = found / found.amax(-1, keepdim=True) * (2**softmax - 1)
    assert torch.allclose(steps, steps.round(), atol=1e-2)
    ratios = exactly / exactly.amax(-1, keepdim=True) * (2**softmax - 1)
    assert ((steps - ratios).abs() < 0.51).all()
    mixed = found.view(1, 2, 2, context) @ value
    assert torch.allclose(out, mixed.view(1, 4, 1, 16).transpose(1, 2), atol=1e-3)


def test_many_alike_tokens_are_not_lost_in_eight_bits() -> None:
    scores = torch.zeros(1000)
    probabilities = scores.softmax(-1)
    assert round_probabilities(probabilities, 8, relative=False).sum() == 0
    assert torch.allclose(round_probabilities(probabilities, 8, relative=True), probabilities)


def test_all_numbers_of_threads_find_the_same(level: str) -> None:
    key, value = states(0, 3, (2, 3, 1000, 64)), states(1, 4, (2, 3, 1000, 64))
    query = torch.randn(2, 9, 2, 64)
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(attend(query, key, value, None, Scoring(0.1)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_where_nothing_may_be_seen_numbers_are_not() -> None:
    key, value = states(0, 4, (1, 1, 5, 8)), states(1, 4, (1, 1, 5, 8))
    mask = torch.full((1, 1, 1, 5), float("-inf"))
    out, _ = attend(torch.randn(1, 1, 1, 8), key, value, mask, Scoring(1.0))
    assert out.isnan().all()


def test_many_queries_meet_decoded_floats() -> None:
    shape = (1, 2, 30, 16)
    key, value = states(0, 4, shape), states(1, 4, shape)
    query = torch.randn(1, 4, MOST_ROWS, 16)
    found = attend(query, key, value, None, Scoring(0.25))
    expected = attend_reference(query, key.decoded(), value.decoded(), None, Scoring(0.25))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_pass_through_decoded_floats() -> None:
    shape = (1, 2, 30, 16)
    key, value = states(0, 4, shape), states(1, 4, shape)
    query = torch.randn(1, 4, 1, 16, requires_grad=True)
    attend(query, key, value, None, Scoring(0.25))[0].sum().backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None
    assert query.grad.abs().max() > 0


def test_other_attention_meets_floats() -> None:
    shape = (2, 2, 30, 16)
    key, value = states(0, 4, shape), states(1, 3, shape)
    query = torch.randn(2, 2, 5, 16)
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    expected = attend_reference(query, key, value, None, Scoring(0.25))[0].transpose(1, 2)
    assert type(found) is Tensor
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(key[:, :, 3:5], key.decoded()[:, :, 3:5])
    assert key.shape == shape


def test_shapes_that_do_not_fit_are_refused() -> None:
    key, value = states(0, 4, (1, 2, 30, 16)), states(1, 4, (1, 2, 29, 16))
    with pytest.raises(ValueError, match="keys and values"):
        attend(torch.randn(1, 4, 1, 16), key, value, None, Scoring(1.0))
    with pytest.raises(ValueError, match="bit streams"):
        attend(torch.randn(1, 4, 1, 24), key, key, None, Scoring(1.0))
    with pytest.raises(ValueError, match="mask"):
        attend(torch.randn(1, 4, 1, 16), key, key, torch.zeros(3, 1, 1, 30), Scoring(1.0))
